#!/usr/bin/env bash
# Make the results that one machine with an NVIDIA card can make in about two hours (on an H100). Not made: engine_kernels,
# raise_to_fp32, the peers of other commits, trial. What was steady_host_bound and steady_gpu_bound is now steady.
#   bash benchmarks/remake.sh benchmarks/results/CARD
# A sweep NAME (benchmarks/sweep/NAME.yaml or one of conf/sweep) gives NAME.md, its table, and NAME.jsonl.gz, its records.
set -eu
out=$1
mkdir -p "$out"
sweep() { # NAME SWEEP [override ...]
  python3 -m lora_lab --config-dir benchmarks "sweep=$2" "hydra.sweep.dir=multirun/benchmarks/$1" "${@:3}" \
    || echo "sweep $1 ended with exit code $?" >&2
}
table() { # NAME [option ...]: of the sweep that ran last
  python3 -m lora_lab.report --table md "${@:2}" > "$out/$1.md"
  python3 -m lora_lab.records pack "multirun/benchmarks/$1" "$out/$1.jsonl.gz"
}

sweep cross cross
table cross
# what fits the card you own: put cards.jsonl.gz to lora_lab/shipped/h100.jsonl.gz, then python -m benchmarks.numbers
sweep cards cards
table cards
sweep one_factor one_factor
table one_factor
sweep smollm2 smollm2
table smollm2
sweep paged paged
vram=vram/optimizer_eligible_gib,vram/optimizer_paged_gib,vram/optimizer_paged_tensors,vram/optimizer_gib
table paged --columns "point,$vram,vram/steady_device_gib,vram/steady_process_gib,vram/steady_reserved_gib,vram/other_gib"
python3 -m benchmarks.paged multirun/benchmarks/paged "$out"
mkdir -p multirun/material
python3 -m benchmarks.peers.material multirun/material llama3_1_8b
sweep load_peak load_peak
table load_peak --columns point,vram/load_allocated_gib,vram/peak_allocated_gib,vram/peak_reserved_gib,vram/peak_device_gib
sweep steady steady
energy=energy/joules_per_token,energy/net_joules_per_token,energy/power_disagreement,energy/idle_watts
table steady --each --columns "point,repeat,window/seconds,throughput/tokens_per_second,throughput/gpu_busy_share,flops/mfu,$energy"
python3 -m benchmarks.steady multirun/benchmarks/steady "$out"
# does every engine learn the same
sweep engine_losses engine_losses
python3 -m benchmarks.engine_losses multirun/benchmarks/engine_losses "$out"

# what whole trainings learn: docs/jobs.md
for name in maths lab_chat quality; do
  sweep $name $name
  python3 -m lora_lab.records pack "multirun/benchmarks/$name" "$out/$name.jsonl.gz"
done
python3 -m benchmarks.killed_jobs "$out"

# the presets with random weights and tokens, on the whole card and on an emulated smaller one
random="model.weights=random data=random_tokens data.rows=128 measure.eval_rows=0 timeout_minutes=5"
short="measure.warmup_steps=3 measure.steps=12"
# shellcheck disable=SC2086  # several words each
{
  sweep paper paper $random $short
  table paper
  sweep paper_8gib paper capacity=8gib $random $short
  table paper_8gib
  sweep paper_factorial_8gib paper_factorial capacity=8gib $random $short
  table paper_factorial_8gib
  # the ladder of engines; the factorial by the engines that are and are not host-bound
  sweep ladder engines repeats=1 $random measure.warmup_steps=4 measure.steps=40
  sweep engines_factorial paper_factorial engine=eager,graph batch_size=1 seq_len=512,2048 repeats=1 $random measure.warmup_steps=4 \
    measure.steps=16
  # what the report in docs/answers is about: the factorial, the same GPU-bound, and the paper's longest rows in 8 GiB
  sweep factorial paper_factorial repeats=3 $random $short
  sweep gpu_bound paper_factorial repeats=6 batch_size=4,8 seq_len=2048 $random $short
  sweep fits paper_factorial repeats=3 capacity=8gib batch_size=1,2 seq_len=2048 optimizer=paged_adamw precision=fp16 \
    method.raise_to_fp32=false,true $random $short
}
python3 -m lora_lab.records pack multirun/benchmarks/{ladder,engines_factorial} "$out/engines.jsonl.gz"
python3 -m lora_lab.records pack multirun/benchmarks/{factorial,gpu_bound,fits} "$out/factorial.jsonl.gz"

# what a sweep cannot measure
python3 -m benchmarks.worker_check "$out" model=tiny data=random_tokens data.rows=64 measure.eval_rows=4 measure.steps=20
python3 -m benchmarks.overhead "$out"
if command -v nvidia-smi > /dev/null; then
  # torch's counter stops at fused attention whose heads share keys and values
  python3 -m benchmarks.flop_check "$out" model=qwen2_5_1_5b model.architecture.num_key_value_heads=12
  python3 -m benchmarks.square_wave "$out"
else
  python3 -m benchmarks.flop_check "$out"
fi
python3 -m benchmarks.looking "$out"
# what lora_lab.fit says, next to what short trials take; the longest rows, confirmed
python3 -m benchmarks.fit_memory "$out" --seconds 1800
python3 -m benchmarks.fit_context "$out" --seconds 900
# other stacks, where they are installed; bf16 LoRA likewise
python3 -m benchmarks.peers "$out"
python3 -m benchmarks.peers "$out" --method lora
