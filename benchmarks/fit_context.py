"""Say the longest rows for each card, and confirm them: what fits for certain has to finish, what is too large not.

    python -m benchmarks.fit_context OUT [--seconds 300] [--have FILE]

A first trial measures what CUDA and its libraries take of this card. Each cell then is two short trials alone on the
card, within an emulated capacity: of the longest rows that `lora-lab fit` calls certain, and of 64 tokens more than it
calls possible. Writes OUT/fit_context.json after every trial; a later call goes on with what FILE does not have.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.compose import compose
from benchmarks.fit_cases import COMMON, MODELS
from benchmarks.fit_memory import Case, Run, earlier
from benchmarks.reports import markdown, stored, where
from lora_lab.config import TrialConfig
from lora_lab.fit.display import ways
from lora_lab.fit.estimate import GIB, estimate
from lora_lab.fit.search import Search
from lora_lab.fit.shapes import shapes_of

CARDS = (8, 12, 16, 24)
_MODELS = {"llama3.1": "Llama-3.1-8B", "qwen2.5": "Qwen2.5-1.5B"}
CONFIRMED = (
    "llama3.1 liger full 8",
    "qwen2.5 graph full 8",
    "llama3.1 graph offloaded 12",
    "qwen2.5 eager full 8",
    "llama3.1 liger full 12",
    "qwen2.5 eager full 12",
    "llama3.1 eager full 16",
    "qwen2.5 eager full 16",
    "llama3.1 compile full 12",
    "qwen2.5 eager full 24",
    "llama3.1 eager full 24",
    "qwen2.5 liger full 8",
    "llama3.1 graph full 16",
    "llama3.1 liger full 16",
)
"""Cells that one card confirms in a few minutes, the most asked-for first."""
_STEP = 64
_LIBRARIES = ["model=tiny", *COMMON, "device=auto", "tracking=none"]

Lengths = dict[str, list[int]]
"""Of each cell: the longest rows that fit for certain, and those that may fit."""


def ways_of(model: str) -> dict[str, TrialConfig]:
    """Return a model's QLoRA trials of rank 32 with one row and 8-bit AdamW, by engine and checkpointing."""
    config = compose(
        [*MODELS[model], *COMMON, "method=qlora", "method.rank=32", "optimizer=adamw_8bit", "batch_size=1"]
    )
    same = (way for way in ways(config) if way.method.quantization is config.method.quantization)
    return {f"{way.engine.kind.name} {way.gradient_checkpointing.name}": way for way in same}


def lengths() -> Lengths:
    """Return what is said of every cell."""
    with ProcessPoolExecutor() as pool:
        rows = pool.map(_row, ((model, way) for model in _MODELS for way in ways_of(model)))
    return {cell: ends for row in rows for cell, ends in row.items()}


def _row(named: tuple[str, str]) -> Lengths:
    model, way = named
    config = ways_of(model)[way]
    search = Search(config, shapes_of(config.model))
    return {
        f"{model} {way} {card}": [search.largest("seq_len", card * GIB, certain=certain) for certain in (True, False)]
        for card in CARDS
    }


def planned(said: Lengths) -> Iterator[Case]:
    """Yield both trials of each cell that is to be confirmed."""
    for cell in CONFIRMED:
        model, engine, mode, card = cell.split()
        way = ways_of(model)[f"{engine} {mode}"]
        shapes = shapes_of(way.model)
        certain, possible = said[cell]
        for end, length in (("fits", certain), ("too large", possible + _STEP)):
            if length and (shapes.longest is None or length <= shapes.longest):
                config = replace(way, seq_len=length, vram_limit_gib=float(card))
                yield Case(f"{cell} {end} {length}", config, estimate(config, shapes))


def table() -> str:
    """Return docs/fit.md's table: all that was said, in bold what trials confirmed at both ends."""
    found = stored("h200/fit_context")
    ended = {name: trial["outcome"] for name, trial in found["trials"].items()}
    lines = []
    for model, title in _MODELS.items():
        for way in ways_of(model):
            cells = [_cell(ended, f"{model} {way} {card}", *found["said"][f"{model} {way} {card}"]) for card in CARDS]
            engine, mode = way.split()
            lines.append([title, f"`{engine}`", mode, *cells])
    head = ["model", "engine", "checkpointing", *(f"{card} GiB" for card in CARDS)]
    small, large = ([end for name, end in ended.items() if each in name] for each in (" fits ", " too large "))
    return (
        f"{markdown(head, lines)}\n\n"
        "Tokens in a row that fit for certain; in brackets, that may fit. Bold: confirmed by a trial at either end. Of "
        f"{len(small)} trials that were to fit, {small.count('finished')} finished; of {len(large)} that were too "
        f"large, {large.count('out_of_memory')} ran out of memory. Capacities emulated on {where(found['origin'])}."
    )


def _cell(ended: dict[str, str], cell: str, certain: int, possible: int) -> str:
    if not possible:
        return "-"
    text = f"{certain:,} ({possible:,})" if possible > certain else f"{certain:,}"
    at_ends = ended.get(f"{cell} fits {certain}"), ended.get(f"{cell} too large {possible + _STEP}")
    return f"**{text}**" if at_ends == ("finished", "out_of_memory") else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--have", type=Path, nargs="*", default=[])
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "lora_lab", *_LIBRARIES], check=True)  # leaves it in the cache for estimates
    trials: dict[str, Any] = earlier(asked.have)
    said = lengths()
    run = Run(asked.out / "fit_context.json", "auto", asked.seconds, trials, said=said)
    run.go(planned(said), at_once=1)


if __name__ == "__main__":
    main()
