"""Say whose the bytes are at the peak of a step: torch's memory history of one trial for each way to save memory.

    python -m benchmarks.memory_owners OUT

One row of 2,048 tokens, Llama-3.1-8B's shapes, QLoRA of rank 16. A tensor's owner is the first file in the stack of its
allocation that is in the list below. Writes OUT/memory_owners.json after every trial.
"""

import multiprocessing
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.compose import compose
from benchmarks.fit_cases import COMMON, MODELS
from benchmarks.reports import markdown, stored
from lora_lab.files import write_json
from lora_lab.fit.estimate import GIB
from lora_lab.store.environment import device_facts, environment
from lora_lab.trial.devices import choose_placement, worker_environment

WAYS = (
    "engine=eager gradient_checkpointing=full",
    "engine=graph gradient_checkpointing=full",
    "engine=graph memory=lean",
    "engine=graph memory=leanest engine.host_layers=all",
)
_TRIAL = [*MODELS["llama3.1"], *COMMON, "method=qlora", "batch_size=1", "seq_len=2048"]

_OWNERS = (
    (r"worker/engines/chunked_loss|loss_utils", "loss"),
    (r"worker/engines/offloaded_checkpoints|utils/checkpoint\.py.*save", "checkpoints"),
    (r"worker/engines/compute_copies", "working copies of adapters"),
    (
        r"worker/engines/(stacked_weights|dequantize)|core_model_loading|random_weights|pretrained\.py"
        r"|bitsandbytes/(functional|backends|autograd)",
        "frozen weights, and what is unpacked of them",
    ),
    (r"torch/optim/|bitsandbytes/optim/|lora_lab/worker/optimizers", "optimizer state"),
    (r"peft/tuners/lora/(layer|bnb)\.py.*(update_layer|reset_lora)|worker/trainables", "adapters"),
    (r"worker/engines/lora_grad|worker/engines/graph_step.*(grad|buffers)", "gradients of adapters"),
    (r"worker/engines/fused_lora", "activations of linear layers"),
    (r"sdpa_attention|flash_attention", "attention"),
    (r"models/\w+/modeling_|worker/engines/tiled_mlp|torchinductor", "other activations"),
)
"""By a pattern in `path name` of a frame, innermost first; whose a tensor is."""


def owner_of(frames: Iterable[Mapping[str, Any]]) -> str:
    """Return whose a tensor is, from the frames of its allocation, innermost first."""
    for frame in frames:
        place = f"{frame['filename']} {frame['name']}"
        for pattern, owner in _OWNERS:
            if re.search(pattern, place):
                return owner
    return "autograd and libraries"


def at_peak(trace: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """Return the bytes of each owner at the moment when most bytes were allocated."""
    live: dict[int, int] = {}
    total = most = at = 0
    for number, event in enumerate(trace):
        if event["action"] == "alloc":
            live[event["addr"]] = event["size"]
            total += event["size"]
            if total > most:
                most, at = total, number
        elif event["action"] == "free_completed":
            total -= live.pop(event["addr"], 0)
    there: dict[int, Mapping[str, Any]] = {}
    for event in trace[: at + 1]:
        if event["action"] == "alloc":
            there[event["addr"]] = event
        elif event["action"] == "free_completed":
            there.pop(event["addr"], None)
    found: Counter[str] = Counter()
    for event in there.values():
        found[owner_of(event.get("frames") or ())] += event["size"]
    return found


def measure(way: str) -> dict[str, int]:
    """Run one trial in this process with torch's memory history, and return the bytes of each owner at its peak."""
    config = compose([*_TRIAL, *way.split()])
    os.environ.update(worker_environment(choose_placement("auto")))
    import torch

    from lora_lab.worker.trial import run_trial

    torch.cuda.memory._record_memory_history(max_entries=4_000_000, stacks="python", context="all")
    with tempfile.TemporaryDirectory() as folder:
        run_trial(config, Path(folder), lambda _: None)
    traces = torch.cuda.memory._snapshot()["device_traces"]
    return dict(at_peak(max(traces, key=len)).most_common())


def main() -> None:
    out = Path(sys.argv[1])
    facts = {**environment(), **device_facts(choose_placement("auto"))}
    facts["commit"] = os.environ.get("LORA_LAB_COMMIT", facts["commit"])  # where only the files are
    found: dict[str, dict[str, int]] = {}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for way, owners in zip(WAYS, pool.map(measure, WAYS), strict=True):
            found[way] = owners
            write_json(out / "memory_owners.json", {"origin": facts, "ways": found})
            print(way, {owner: f"{size / GIB:.2f}" for owner, size in owners.items()}, flush=True)


def table() -> str:
    """Return docs/small_cards.md's table, from the stored trials."""
    content = stored("h200/memory_owners")
    ways: list[dict[str, int]] = [*content["ways"].values()]
    owners = {owner for way in ways for owner in way}
    lines = [
        [owner, *(f"{way[owner] / GIB:.2f}" if owner in way else "-" for way in ways)]
        for owner in sorted(owners, key=lambda each: -max(way.get(each, 0) for way in ways))
    ]
    lines.append(["all", *(f"{sum(way.values()) / GIB:.2f}" for way in ways)])
    head = ["GiB at the peak", *(f"`{way}`" for way in content["ways"])]
    origin = content["origin"]
    return f"{markdown(head, lines)}\n\nMeasured on an {origin['device']}, commit {origin['commit'][:7]}."


if __name__ == "__main__":
    main()
