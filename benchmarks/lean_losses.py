"""Compare the losses of every way to save memory with those of engine=eager, and the memory that each takes.

    python -m benchmarks.lean_losses OUT          20 steps of random tokens, four layers of Llama-3.1-8B's shapes
    python -m benchmarks.lean_losses text OUT     100 steps of real text, SmolLM2's weights, AdamW and SGD
    python -m benchmarks.lean_losses text OUT PATTERN      those whose names have a match, and what they compare with

Several trials at a time on one card, the same rows in all of them. Writes OUT/lean_losses.json or OUT/lean_text.json.
SGD sees a gradient that is too large by a factor, which AdamW does not. One trial of the text has such a fault planted.
"""

import multiprocessing
import os
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
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
    with tempfile.TemporaryDirectory() as folder:
        return _run([*_BASE, *case.split()], Path(folder))


def _run(overrides: list[str], folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"losses": [], "peak": 0, "ran": {}}

    def note(event: Event) -> None:
        if isinstance(event, Step):
            found["losses"].append(event.loss)
        elif isinstance(event, PhaseMemory) and event.phase in _TRAINING:
            found["peak"] = max(found["peak"], event.peak_allocated_bytes)
        elif isinstance(event, Ran):
            found["ran"] = event.facts

    placement = choose_placement("auto")
    end = worker_process.run_workers(compose(overrides), worker_environment(placement), folder, note)
    return {**found, "outcome": end.outcome.value, "reason": end.reason}


_TEXT = [
    *("model=smollm2_135m", "data=maths", "data.batching=packed", "seq_len=512", "batch_size=4", "method=qlora"),
    *("measure.warmup_steps=5", "measure.steps=95", "measure.eval_rows=0", "measure.profile_steps=0"),
    *("measure.idle_seconds=0", "tracking=none"),
]
_ADAMW = "optimizer=adamw_fused learning_rate=1e-3"
_SGD = "optimizer.optim=null optimizer.target=torch.optim.SGD learning_rate=0.05 max_grad_norm=0"
_SMALL_TILE, _LAYERS = "engine.mlp_tile=512", "engine.host_layers=all"
_WAYS = (
    "engine=eager",
    "engine=eager seed=0",  # once more: what eager differs from itself
    f"engine=eager {_OFFLOADED} {_SMALL_TILE}",
    f"engine=eager {_LAYERS}",
    f"engine=liger {_OFFLOADED} {_LAYERS}",
    f"engine=compile {_OFFLOADED} {_SMALL_TILE} {_LAYERS}",
    f"engine=graph {_OFFLOADED}",
    f"engine=graph {_OFFLOADED} {_SMALL_TILE}",
    f"engine=graph {_OFFLOADED} {_SMALL_TILE} {_LAYERS}",
    f"engine=graph {_FULL} {_SMALL_TILE}",
)
_PLANTED = f"engine=eager {_OFFLOADED} {_SMALL_TILE} planted"
_SHORT_OF = "engine=eager grad_accum_steps=2", f"engine=graph {_OFFLOADED} {_SMALL_TILE} {_LAYERS} grad_accum_steps=2"
_IN_FP16 = "engine=eager precision=fp16", f"engine=graph {_OFFLOADED} {_SMALL_TILE} {_LAYERS} precision=fp16"
TEXT_CASES = (
    *(f"{way} {_ADAMW}" for way in _WAYS),
    *(f"{way} {_SGD}" for way in (*_WAYS, _PLANTED, *_SHORT_OF, *_IN_FP16)),
)


def measure_text(case: str) -> dict[str, Any]:
    """Run one trial of real text; return its losses, what ran, and the trained B matrices' place."""
    words = case.split()
    if "planted" in words:
        words.remove("planted")
        _plant()
        words.append("isolation=inline")
    with tempfile.TemporaryDirectory() as folder:
        found = _run([*_TEXT, *words], Path(folder))
        adapter = Path(folder) / "adapter" / "adapter_model.safetensors"
        if adapter.is_file():
            (_ADAPTERS / f"{TEXT_CASES.index(case)}.safetensors").write_bytes(adapter.read_bytes())
    return found


def _plant() -> None:
    """Make the gradients of the MLP's adapters half as large again, where the MLP is in tiles."""
    import torch

    right = torch.autograd.grad

    def wrong(*arguments: Any, **named: Any) -> Any:
        of_input, *of_adapters = right(*arguments, **named)
        return (of_input, *(1.5 * each for each in of_adapters))

    torch.autograd.grad = wrong


_ADAPTERS = Path(tempfile.gettempdir()) / "lean_text_adapters"


def distances() -> dict[str, float]:
    """Compare the adapters' B, which starts at zero, with eager's: the norm of the difference over eager's norm."""
    from safetensors.torch import load_file

    found, loaded = {}, {}
    for number, case in enumerate(TEXT_CASES):
        path = _ADAPTERS / f"{number}.safetensors"
        if path.is_file():
            loaded[case] = {name: b.float() for name, b in load_file(path).items() if "lora_B" in name}
    for case, each in loaded.items():
        other = loaded.get(reference_of(case))
        if other is not None:
            apart = sum(float((each[name] - other[name]).square().sum()) for name in other) ** 0.5
            found[case] = apart / sum(float(b.square().sum()) for b in other.values()) ** 0.5
    return found


def reference_of(case: str) -> str:
    """Return eager's trial with the same optimizer, precision and accumulation."""
    settings = next((each for each in ("grad_accum_steps=2", "precision=fp16") if each in case), "")
    return " ".join(["engine=eager", *([settings] if settings else []), _SGD if _SGD in case else _ADAMW])


def main() -> None:
    is_text = sys.argv[1] == "text"
    out = Path(sys.argv[2 if is_text else 1])
    patterns = sys.argv[3:] if is_text else []
    facts = {**environment(), **device_facts(choose_placement("auto"))}
    facts["commit"] = os.environ.get("LORA_LAB_COMMIT", facts["commit"])  # where only the files are
    cases, run = (TEXT_CASES, measure_text) if is_text else (CASES, measure)
    for pattern in patterns:
        asked = [case for case in cases if re.search(pattern, case)]
        cases = tuple(dict.fromkeys([*map(reference_of, asked), *asked]))
    _ADAPTERS.mkdir(exist_ok=True)
    trials: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(_AT_ONCE, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        running = {pool.submit(run, case): case for case in cases}
        for future in as_completed(running):
            trials[running[future]] = future.result()
            print(trials[running[future]]["outcome"], running[future], flush=True)
            apart = distances() if is_text else {}
            stored_trials = {case: {**trial, "adapters_apart": apart.get(case)} for case, trial in trials.items()}
            name = "lean_text" if is_text else "lean_losses"
            write_json(out / f"{name}.json", {"origin": facts, "trials": stored_trials})


def text_table() -> str:
    """Return docs/small_cards.md's table of real text, from the stored trials."""
    files = [stored(f"h200/{name}") for name in ("lean_text", "lean_text_more", "lean_text_accumulation")]
    lines = []
    for case, trials in [(case, content["trials"]) for content in files for case in TEXT_CASES]:
        trial, reference = (trials.get(each) for each in (case, reference_of(case)))
        if trial is None or reference is None or case == reference_of(case):
            continue
        apart = [abs(one - other) for one, other in zip(trial["losses"], reference["losses"], strict=True)]
        ways = case.removesuffix(_SGD).removesuffix(_ADAMW).strip().replace(" seed=0", "` once more`")
        distance = trial["adapters_apart"]
        lines.append(
            [
                f"`{ways}`".replace("``", ""),
                "SGD" if _SGD in case else "AdamW",
                f"{max(apart):.4f}",
                f"{sum(apart) / len(apart):.4f}",
                "-" if distance is None else f"{100 * distance:.2f} %",
            ]
        )
    head = ["settings", "optimizer", "largest difference from eager, nats", "mean of 100 steps", "adapters' distance"]
    origins = [content["origin"] for content in files]
    commits = ", ".join(origin["commit"][:7] for origin in origins)
    return f"{markdown(head, lines)}\n\nMeasured on an {origins[0]['device']}, commits {commits}."


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
