#!/usr/bin/env bash
# The default trial with real weights and real text on a GPU machine, by the real command line.
#   bash benchmarks/smollm2.sh OUT
set -u
out=$1
export PYTHONUNBUFFERED=1
run() { echo "\$ python -m lora_lab $*"; timeout 170 python3 -m lora_lab "$@" 2>&1; echo "exit code $?"; }
{
  run optimizer=paged_adamw precision=fp16
  run -m data.batching=longest,seq_len,packed measure.steps=40
} | grep -v '^  files \|ui --backend' | tee "$out/smollm2.txt"
for f in multirun/*/*/record.json multirun/*/*/*/record.json; do [ -f "$f" ] && cp "$f" "$out/$(echo "$f" | tr '/' '_')"; done
cat multirun/*/*/traceback.txt multirun/*/*/*/traceback.txt 2>/dev/null
