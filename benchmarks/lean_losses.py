"""Compare the losses of every way to save memory with those of engine=eager, and the memory that each takes.

    python -m benchmarks.lean_losses OUT

Short trials of four layers of Llama-3.1-8B's shapes, several at a time on one card: 20 steps of one row of 4,096 random
tokens, the same in all of them. Writes OUT/lean_losses.json.
"""

import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.compose import compose
from benchmarks.reports import markdown, stored
from lora_lab.events import Event, PhaseMemory, Ran, Step
from lora_lab.files import write_json
from lora_lab.fit.estimate import GIB
from lora_lab.store.environment import device_facts, environment
from lora_lab.trial import worker_process
from lora_lab.trial.devices import choose_placement, worker_environment

_BASE = [
    *("model=llama3_1_8b", "model.architecture.num_hidden_layers=4", "model.weights=random", "data=random_tokens"),
    *("data.rows=64", "batch_size=1", "seq_len=4096", "method=qlora", "learning_rate=1e-3"),
    *("measure.warmup_steps=2", "measure.steps=18", "measure.eval_rows=0", "measure.profile_steps=0"),
    *("measure.idle_seconds=0", "tracking=none"),
]
_OFFLOADED, _FULL = "gradient_checkpointing=offloaded", "gradient_checkpointing=full"
_TILE, _HOST = "engine.mlp_tile=1024", "engine.host_embeddings=true"
_LEAN = f"{_OFFLOADED} {_HOST} {_TILE}"
CASES = (
    "engine=eager",
    f"engine=eager {_OFFLOADED}",
    f"engine=eager {_OFFLOADED} {_TILE}",
    f"engine=eager {_OFFLOADED} {_HOST}",
    f"engine=liger {_OFFLOADED} {_HOST}",
    f"engine=compile {_OFFLOADED}",
    f"engine=compile {_LEAN}",
    f"engine=graph {_OFFLOADED}",
    f"engine=graph {_OFFLOADED} {_HOST}",
    f"engine=graph {_OFFLOADED} {_TILE}",
    f"engine=graph {_LEAN}",
    f"engine=graph {_FULL} {_TILE}",
    f"engine=graph {_TILE}",
    "engine=eager precision=fp16",
    f"engine=graph {_LEAN} precision=fp16",
    "engine=eager grad_accum_steps=2",
    f"engine=graph {_LEAN} grad_accum_steps=2",
)
_AT_ONCE = 9
_TRAINING = ("first_step", "warm_up", "window")


def measure(case: str) -> dict[str, Any]:
    """Run one trial; return its losses, its peak of live tensors in bytes, and what ran."""
    found: dict[str, Any] = {"losses": [], "peak": 0, "ran": {}}

    def note(event: Event) -> None:
        if isinstance(event, Step):
            found["losses"].append(event.loss)
        elif isinstance(event, PhaseMemory) and event.phase in _TRAINING:
            found["peak"] = max(found["peak"], event.peak_allocated_bytes)
        elif isinstance(event, Ran):
            found["ran"] = event.facts

    placement = choose_placement("auto")
    with tempfile.TemporaryDirectory() as folder:
        config = compose([*_BASE, *case.split()])
        end = worker_process.run_workers(config, worker_environment(placement), Path(folder), note)
    return {**found, "outcome": end.outcome.value, "reason": end.reason}


def main() -> None:
    out = Path(sys.argv[1])
    facts = {**environment(), **device_facts(choose_placement("auto"))}
    facts["commit"] = os.environ.get("LORA_LAB_COMMIT", facts["commit"])  # where only the files are
    with ProcessPoolExecutor(_AT_ONCE, multiprocessing.get_context("spawn")) as pool:
        trials = dict(zip(CASES, pool.map(measure, CASES), strict=True))
    write_json(out / "lean_losses.json", {"origin": facts, "trials": trials})
    print(json.dumps({case: trial["outcome"] for case, trial in trials.items()}, indent=0))


def table() -> str:
    """Return docs/small_cards.md's table, from the stored trials."""
    content = stored("h200/lean_losses")
    lines = []
    for case in CASES:
        trial = content["trials"][case]
        reference = content["trials"][_reference(case)]
        apart = max(abs(one - other) for one, other in zip(trial["losses"], reference["losses"], strict=True))
        lines.append(
            [f"`{case}`", "-" if trial is reference else f"{apart:.4f}", f"{trial['peak'] / GIB:.2f}"],
        )
    head = ["settings", "largest difference of a step's loss from eager's, nats", "live tensors, GiB"]
    origin = content["origin"]
    return f"{markdown(head, lines)}\n\nMeasured on an {origin['device']}, commit {origin['commit'][:7]}."


def _reference(case: str) -> str:
    return next(
        (f"engine=eager {end}" for end in ("precision=fp16", "grad_accum_steps=2") if case.endswith(end)),
        "engine=eager",
    )


if __name__ == "__main__":
    main()
