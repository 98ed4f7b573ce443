#!/usr/bin/env bash
# A first look on a GPU machine: tiny trials, one at real shapes, the worker check; with every log that failed.
set -u
export PYTHONUNBUFFERED=1
nvidia-smi -L; python3 -c 'import torch, transformers, peft; print(torch.__version__, transformers.__version__, peft.__version__)'
run() { echo "== $*"; timeout 60 python3 -m lora_lab "$@" 2>&1 | grep -v '^  \(starting\|saving\|reading\|warm\)'; }
run model=tiny measure=quick optimizer=paged_adamw precision=fp16
run model=qwen2_5_1_5b model.weights=random data=random_tokens data.rows=64 optimizer=paged_adamw precision=fp16 \
  batch_size=1 seq_len=512 gradient_checkpointing=true measure.steps=10 measure.eval_rows=4
timeout 100 python3 -m benchmarks.worker_check "${OUT:-.}" model=tiny data=random_tokens data.rows=64 measure.eval_rows=4 measure.steps=20 2>&1 | grep -v '"_Z'
for f in multirun/*/*/traceback.txt; do [ -f "$f" ] && { echo "== $f"; cat "$f"; tail -5 "$(dirname "$f")/worker.log"; }; done
tar czf "${OUT:-.}/multirun.tgz" --exclude=adapter multirun
