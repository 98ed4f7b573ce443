#!/usr/bin/env bash
# Make every result under benchmarks/results/ again, on a machine with an NVIDIA card (about an hour on an H100).
#   bash benchmarks/remake.sh benchmarks/results/CARD
set -eu
python3 -m benchmarks.worker_check "$1" model=tiny data=random_tokens data.rows=64 measure.eval_rows=4 measure.steps=20
python3 -m benchmarks.cross "$1"
python3 -m benchmarks.one_factor "$1"
python3 -m benchmarks.command_line "$1"
python3 -m benchmarks.overhead "$1"
for set in paper paper_8gib paper_factorial paper_factorial_8gib; do
  python3 -m benchmarks.presets "$1" "$set"
done
