#!/usr/bin/env bash
# Make every result under benchmarks/results/ again, on a machine with an NVIDIA card (about two hours on an H100).
#   bash benchmarks/remake.sh benchmarks/results/CARD
set -eu
python3 -m benchmarks.worker_check "$1" model=tiny data=random_tokens data.rows=64 measure.eval_rows=4 measure.steps=20
python3 -m benchmarks.cross "$1"
python3 -m benchmarks.one_factor "$1"
python3 -m benchmarks.command_line "$1"
python3 -m benchmarks.overhead "$1"
if command -v nvidia-smi > /dev/null; then
  # torch's counter stops at fused attention whose heads share keys and values
  python3 -m benchmarks.flop_check "$1" model=qwen2_5_1_5b model.architecture.num_key_value_heads=12
else
  python3 -m benchmarks.flop_check "$1"
fi
python3 -m benchmarks.paged "$1"
python3 -m benchmarks.load_peak "$1"
python3 -m benchmarks.steady "$1" host_bound
python3 -m benchmarks.steady "$1" gpu_bound
python3 -m benchmarks.looking "$1"
for set in paper paper_8gib paper_factorial_8gib; do
  python3 -m benchmarks.presets "$1" "$set"
done
# beside other stacks, what is installed of them; bf16 LoRA likewise
python3 -m benchmarks.peers "$1"
python3 -m benchmarks.peers "$1" --method lora
# does every engine learn the same; the ladder of engines; the factorial by the engines that are and are not host-bound
python3 -m benchmarks.engine_losses "$1" model=smollm2_135m
random="model.weights=random data=random_tokens data.rows=128 measure.eval_rows=0 timeout_minutes=5 tracking=none"
# shellcheck disable=SC2086  # words of their own
python3 -m lora_lab sweep=engines repeats=1 $random measure.warmup_steps=4 measure.steps=40 \
  hydra.sweep.dir=multirun/engines/ladder
# shellcheck disable=SC2086
python3 -m lora_lab sweep=paper_factorial engine=eager,graph seq_len=512,2048 repeats=1 $random measure.warmup_steps=4 \
  measure.steps=16 hydra.sweep.dir=multirun/engines/factorial
python3 -m lora_lab.records pack multirun/engines/ladder multirun/engines/factorial "$1/engines.jsonl.gz"
# what the report in docs/answers is about: the factorial, the same GPU-bound, and the paper's longest rows within 8 GiB
sweep() {
  python3 -m lora_lab sweep=paper_factorial model.weights=random data=random_tokens data.rows=128 measure.warmup_steps=3 \
    measure.steps=12 measure.eval_rows=0 timeout_minutes=5 tracking=none "hydra.sweep.dir=multirun/factorial/$1" "${@:2}"
}
sweep all repeats=3
sweep gpu_bound repeats=6 batch_size=4,8 seq_len=2048
sweep fits repeats=3 capacity=8gib batch_size=1,2 seq_len=2048 optimizer=paged_adamw precision=fp16 \
  method.raise_to_fp32=false,true
python3 -m lora_lab.records pack multirun/factorial/all multirun/factorial/gpu_bound multirun/factorial/fits \
  "$1/factorial.jsonl.gz"
