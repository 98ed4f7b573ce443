"""Compare ways to train every weight with fused AdamW on fp32 weights: memory, tokens/s, loss after equal tokens.

    python -m benchmarks.full_training OUT [--rounds 2] [--seconds 330] [--only WORD] [--names PATTERN] [--have FILE]
        [--rehearse]

Each trial is a command of its own, alone on the card. In every round each cell's contenders run in turns, and the order
changes from round to round. Writes OUT/full_training.json after every trial; no trial begins that would probably end
after --seconds. --have goes on after the turns of an earlier file.
--rehearse runs a tiny model on the CPU.

The goals: 1.5B at 1x2048 within 7.5 GiB of the card and 8B within 23 GiB, at 90 % of fused AdamW's speed, and with
its loss.
"""

import argparse
import json
import os
import re
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.data_parallel import COMMON, run
from benchmarks.reports import markdown, provenance, stored, where
from lora_lab.files import write_json

_SHAPES = [*COMMON, "data.rows=256", "batch_size=1", "seq_len=2048", "measure.warmup_steps=4", "measure.steps=12"]
_LEAN = ["engine=compile", "gradient_checkpointing=full", "engine.chunked_loss=true"]
_WITHIN = ["optimizer.in_backward=true", "max_grad_norm=0"]
_REAL = [
    "model=smollm2_135m",
    "tracking=none",
    "measure.general_rows=0",
    "measure.answers=0",
    "measure.steps=100",
    "batch_size=8",
    "seq_len=512",
    "learning_rate=2e-5",
]
_SMALL = ["batch_size=2", "seq_len=256", "measure.eval_rows=32", "measure.warmup_steps=1"]
_MEMORY = {
    "adamw": ["method=full", "optimizer=adamw_fused"],
    "adamw, in 8 bit within the backward": ["method=full_bf16", "optimizer=adamw_torchao_8bit", *_WITHIN],
    "adamw, 8 bit of our own within the backward": ["method=full_bf16", "optimizer=adamw_8bit_compiled", *_WITHIN],
    "adamw, 8 bit of our own, checkpoints in host memory": [
        *("method=full_bf16", "optimizer=adamw_8bit_compiled", *_WITHIN),
        "gradient_checkpointing=offloaded",
    ],
    "adamw, 8 bit of our own, checkpoints in host memory, on 7.5 GiB": [
        *("method=full_bf16", "optimizer=adamw_8bit_compiled", *_WITHIN),
        *("gradient_checkpointing=offloaded", "vram_limit_gib=7.5"),
    ],
    "adamw, in 4 bit within the backward": ["method=full_bf16", "optimizer=adamw_torchao_4bit", *_WITHIN],
    "apollo_mini within the backward": ["method=full_bf16", "optimizer=apollo_mini", *_WITHIN],
    "adalomo": ["method=full_bf16", "optimizer=adalomo", "max_grad_norm=0"],
    "lomo": ["method=full_bf16", "optimizer=lomo", "max_grad_norm=0"],
}
_LOSSES = {
    "adamw": ["method=full", "optimizer=adamw_fused"],
    "adamw on bf16": ["method=full_bf16", "optimizer=adamw_fused"],
    "adamw on bf16, in 8 bit": ["method=full_bf16", "optimizer=adamw_torchao_8bit"],
    "adamw on bf16, 8 bit of our own": ["method=full_bf16", "optimizer=adamw_8bit_compiled"],
    "adamw on bf16, in 4 bit": ["method=full_bf16", "optimizer=adamw_torchao_4bit"],
}
CELLS: dict[str, dict[str, list[str]]] = {
    "1.5B 1x2048": {name: [*_SHAPES, "model=qwen2_5_1_5b", *_LEAN, *own] for name, own in _MEMORY.items()},
    "8B 1x2048": {name: [*_SHAPES, "model=llama3_1_8b", *_LEAN, *own] for name, own in _MEMORY.items()},
    "loss 135M 8x512": {name: [*_REAL, *own] for name, own in _LOSSES.items()},
    "loss 135M 2x256, fp32 on a CPU": {
        name: [*_REAL, "device=cpu", "precision=fp32", "method=full", "measure.steps=60", *_SMALL, optimizer]
        for name, optimizer in (
            ("adamw", "optimizer=adamw_fused"),
            ("adamw, 8 bit of our own, weights in fp32", "optimizer=adamw_8bit_compiled"),
        )
    },
}
_TINY = {
    "tiny 2x64": {
        name: [
            *COMMON,
            "model=tiny",
            "device=cpu",
            "data.rows=60",
            "batch_size=2",
            "seq_len=64",
            "precision=bf16",
            *own,
        ]
        for name, own in _MEMORY.items()
        # torchao is an extra, and there is no card to limit
        if not any(word in name for word in ("in 8 bit", "in 4 bit", "GiB"))
    }
}
_FIGURES = (
    "throughput/tokens_per_second",
    "vram/peak_allocated_gib",
    "vram/peak_reserved_gib",
    "vram/peak_device_gib",
    "vram/peak_process_gib",
    "energy/joules_per_token",
)
_LOSS = "loss/eval"


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Return for each cell and contender the medians of what was measured, and the speed next to fused AdamW's."""
    found: dict[str, Any] = {}
    for turn in turns:
        own = found.setdefault(turn["cell"], {}).setdefault(turn["name"], {"turns": 0, "outcomes": []})
        own["turns"] += 1
        own["outcomes"].append(turn["outcome"])
        for figure in (*_FIGURES, _LOSS):
            if figure in turn["metrics"]:
                own.setdefault(figure, []).append(turn["metrics"][figure])
    for cell in found.values():
        for own in cell.values():
            own |= {figure: statistics.median(own[figure]) for figure in (*_FIGURES, _LOSS) if figure in own}
        first = cell.get("adamw", {}).get(_FIGURES[0])
        for own in cell.values():
            own["of adamw's speed"] = own[_FIGURES[0]] / first if first and _FIGURES[0] in own else None
    return found


def table() -> str:
    """Return docs/methods.md's table, from the stored trials."""
    content = stored("h200/full_training")
    lines = []
    for cell, contenders in content["summary"].items():
        for name, own in contenders.items():
            outcomes = ", ".join(sorted(set(own["outcomes"])))
            speed, share = own.get(_FIGURES[0]), own.get("of adamw's speed")
            memory = " / ".join(_figure(own.get(f"vram/peak_{kind}_gib"), ".2f") for kind in ("allocated", "process"))
            lines.append(
                [cell, name, str(own["turns"]), outcomes, _figure(speed, ",.0f"), _figure(share, ".2f"), memory]
            )
    head = ["cell", "contender", "trials", "outcome", "tokens/s", "of adamw's", "live / process GiB"]
    commits = ", ".join(sorted({turn["commit"][:7] for turn in content["turns"]}))
    return f"{markdown(head, lines)}\n\nMeasured on an {content['origin']['device']}, commits {commits}."


def loss_table() -> str:
    """Return docs/methods.md's tables of losses after equal tokens, on a CPU and on a card, from the stored trials."""
    found = []
    for name in ("cpu/full_training", "h200/full_training_loss"):
        content = stored(name)
        turns = sorted(content["turns"], key=lambda turn: (turn["name"], turn["round"]))
        lines = [[turn["name"], str(turn["round"]), f"{turn['metrics'][_LOSS]:.4f}"] for turn in turns]
        text = markdown(["contender", "seed", "held-out loss"], lines)
        found.append(f"{text}\n\nMeasured on {where(content['origin'])}.")
    return "\n\n".join(found)


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=330.0)
    parser.add_argument("--only", default="", help="cells whose names have this")
    parser.add_argument("--names", default="", help="a regular expression: contenders whose names have a match")
    parser.add_argument("--have", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    due = time.monotonic() + asked.seconds
    turns: list[dict[str, Any]] = [] if asked.have is None else json.loads(asked.have.read_text())["turns"]
    done = {(turn["cell"], turn["name"], turn["round"]) for turn in turns}
    for number in range(asked.rounds):
        for cell, contenders in (_TINY if asked.rehearse else CELLS).items():
            if asked.only not in cell:
                continue
            names = [name for name in contenders if re.search(asked.names, name)]
            turn = number % max(1, len(names))
            for name in names[turn:] + names[:turn]:
                longest = max((turn["seconds"] for turn in turns if turn["cell"] == cell), default=0.0)
                if (cell, name, number) in done or time.monotonic() + longest > due:
                    continue
                found = run(f"{name}-{cell}".replace(" ", "_").replace(",", ""), [*contenders[name], f"seed={number}"])
                tags = found.pop("tags")
                kept = {key: text for key, text in tags.items() if key.startswith("ran.") or key == "reason"}
                origin = provenance(tags, "python -m benchmarks.full_training") if tags else {}
                turns.append({"cell": cell, "name": name, "round": number, **found, "ran": kept})
                turns[-1] |= {name: origin.get(name, "") for name in ("commit", "date", "device.uuid")}
                write_json(
                    asked.out / "full_training.json", {"origin": origin, "summary": summary(turns), "turns": turns}
                )
                figures = [found["metrics"].get(figure) for figure in (*_FIGURES, _LOSS)]
                print(cell, "|", name, found["outcome"], *figures, f"{found['seconds']:.0f} s", flush=True)
                if found["outcome"] != "finished":
                    print("   ", tags.get("reason", "")[:300], flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
