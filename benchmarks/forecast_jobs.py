"""Compare forecasts with jobs: before anything ran, after a probe, and what the job then took.

    python -m benchmarks.forecast_jobs OUT [--seconds 300] [--have FILE ...] [--rehearse]

Each case is a short job on rows of text, alone on the card, with random weights of the model's shapes. It is forecast
from the card's rates, then from a probe as `lora-lab forecast --probe` makes it; then it runs as its own command.
Writes OUT/forecast_jobs.json after every case; a later call goes on with the cases that earlier files (--have) do not
have.
--rehearse runs one case of the tiny model on the CPU.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.reports import markdown, stored, where
from lora_lab.composition.once import compose_once
from lora_lab.files import write_json
from lora_lab.forecast.ask import ask
from lora_lab.forecast.estimate import Forecast, Range
from lora_lab.forecast.probe import probe
from lora_lab.store.environment import device_facts, environment
from lora_lab.store.trial_folder import TrialFolder
from lora_lab.trial.devices import choose_placement

_COMMON = [
    "model.weights=random",
    "measure.eval_rows=0",
    "measure.general_rows=0",
    "measure.answers=0",
    "measure.profile_steps=0",
    "measure.idle_seconds=0",
]
_QWEN, _LLAMA, _SMOL = "model=qwen2_5_1_5b", "model=llama3_1_8b", "model=smollm2_135m"
_FIXED = "data.batching=seq_len"
CASES = {
    "1.5B qlora eager 2x1024": [_QWEN, "method=qlora", "batch_size=2", "seq_len=1024", "data=lab_chat"],
    "1.5B qlora graph 8x1024 full": [
        *(_QWEN, "method=qlora", "engine=graph", "batch_size=8", "seq_len=1024", "data=lab_chat", _FIXED),
        "gradient_checkpointing=full",
    ],
    "8B qlora liger 2x1024 full": [
        *(_LLAMA, "method=qlora", "engine=liger", "batch_size=2", "seq_len=1024", "data=lab_chat"),
        "gradient_checkpointing=full",
    ],
    "135M lora eager 4x512": [_SMOL, "method=lora", "batch_size=4", "seq_len=512", "data=maths"],
    "8B lora graph 1x1024": [
        *(_LLAMA, "method=lora", "engine=graph", "batch_size=1", "seq_len=1024", "data=lab_chat", _FIXED),
    ],
    "1.5B lora liger 4x1024": [_QWEN, "method=lora", "engine=liger", "batch_size=4", "seq_len=1024", "data=lab_chat"],
    "8B qlora eager 1x1024": [_LLAMA, "method=qlora", "batch_size=1", "seq_len=1024", "data=lab_chat"],
    "1.5B lora eager fp16 2x512": [
        *(_QWEN, "method=lora", "precision=fp16", "batch_size=2", "seq_len=512", "data=maths"),
    ],
    "1.5B qlora eager paged 2x512": [
        *(_QWEN, "method=qlora", "optimizer=paged_adamw", "batch_size=2", "seq_len=512", "data=maths"),
    ],
    "135M qlora graph 8x512": [
        *(_SMOL, "method=qlora", "engine=graph", "batch_size=8", "seq_len=512", "data=maths", _FIXED),
    ],
}
"""Jobs by name, the most different first."""
_TINY = {"tiny": ["model=tiny", "device=cpu", "method=lora", "batch_size=2", "seq_len=64", "data=lab_chat"]}
_JOB_SECONDS = 12.0
"""How long the steps of a job take, by the first forecast."""
_FEWEST_STEPS = 20
_CASE_SECONDS = 70.0
"""No case begins with less time left."""


def measure(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Forecast a job twice, run it, and return all three."""
    typed = [*overrides, *_COMMON]
    first = ask(compose_once([*typed, "train.max_steps=1"]))
    steps = max(_FEWEST_STEPS, math.ceil(_JOB_SECONDS / first.step.seconds))
    typed.append(f"train.max_steps={steps}")
    config = compose_once(typed)
    question = ask(config)
    before = question.answer(None)
    began = time.monotonic()
    folder = probe(typed, config, question.step.seconds)
    probe_seconds = time.monotonic() - began
    after = question.answer(folder)
    own = Path("multirun/benchmarks/forecast_jobs") / name.replace(" ", "_")
    began = time.monotonic()
    command = [sys.executable, "-m", "lora_lab", *typed, f"hydra.run.dir={own}"]
    done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
    record = TrialFolder(own).record()
    metrics = {} if record is None else record.metrics
    return {
        "steps": steps,
        "card_is_longer": question.step.card >= question.step.host,
        "before": _said(before),
        "after": {**_said(after), "probe_seconds": probe_seconds},
        "job": {
            "exit_code": done.returncode,
            "seconds": time.monotonic() - began,
            "metrics": {key: value for key, value in metrics.items() if key.startswith(_KEPT)},
        },
    }


_KEPT = ("throughput/", "energy/", "time/", "job/")


def _said(answer: Forecast) -> dict[str, Any]:
    return {
        "source": answer.source.name,
        "step_seconds": answer.step_seconds,
        "half": answer.source.half,
        "seconds": _range(answer.seconds),
        "kwh": None if answer.kwh is None else _range(answer.kwh),
        "parts": {part.name: part.seconds for part in answer.parts},
    }


def _range(found: Range) -> list[float]:
    return [found.value, found.low, found.high]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--have", type=Path, nargs="*", default=[])
    parser.add_argument("--rehearse", action="store_true")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    due = time.monotonic() + asked.seconds
    found = {name: case for file in asked.have for name, case in json.loads(file.read_text())["cases"].items()}
    facts = {**environment(), **device_facts(choose_placement("cpu" if asked.rehearse else "auto"))}
    facts["commit"] = os.environ.get("LORA_LAB_COMMIT", facts["commit"])  # where only the files are
    for name, overrides in (_TINY if asked.rehearse else CASES).items():
        if name in found or time.monotonic() > due - _CASE_SECONDS:
            continue
        found[name] = measure(name, overrides)
        write_json(asked.out / "forecast_jobs.json", {"origin": facts, "cases": found})
        print(name, _line(found[name]), flush=True)


def _line(case: dict[str, Any]) -> str:
    errors = (f"{key} {error:+.1f} %" for key, error in errors_of(case).items() if error is not None)
    return ", ".join(errors)


def errors_of(case: dict[str, Any]) -> dict[str, float | None]:
    """Return by how many percent of the measured value the forecasts of a case were off."""
    metrics = case["job"]["metrics"]
    step = 1 / metrics["throughput/steps_per_second"] if "throughput/steps_per_second" in metrics else None
    kwh = metrics.get("job/kwh")
    found: dict[str, float | None] = {}
    for when in ("before", "after"):
        said = case[when]
        for what, value, real in (
            ("step", said["step_seconds"], step),
            ("whole", said["seconds"][0], case["job"]["seconds"]),
            ("energy", said["kwh"][0] if said["kwh"] else None, kwh),
        ):
            found[f"{what} {when}"] = None if real is None or value is None else 100 * (value / real - 1)
    return found


def table() -> str:
    """Return docs/forecast.md's table of jobs, from the stored comparison."""
    content = stored("h200/forecast_jobs")
    lines = []
    for name, case in content["cases"].items():
        errors = errors_of(case)
        lines.append([name, f"{case['job']['seconds']:.0f} s", *(_percent(errors[key]) for key in _COLUMNS)])
    return f"{markdown(['job', 'took', *_COLUMNS], lines)}\n\nMeasured on {where(content['origin'])}."


_COLUMNS = ("step before", "step after", "whole before", "whole after", "energy before", "energy after")


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{error:+.0f} %"


if __name__ == "__main__":
    main()
