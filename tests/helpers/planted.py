"""Trials made by hand, as a store would give them back."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lora_lab.config import TrackingConfig
from lora_lab.store.mlflow_store import open_tracker
from lora_lab.store.record import Record
from lora_lab.store.trials import Trial

_numbers = itertools.count()

SETTINGS = {
    "optimizer": "adamw",
    "optimizer.optim": "adamw_torch",
    "precision": "fp16",
    "precision.dtype": "fp16",
    "method": "qlora",
    "model": "qwen2_5_1_5b",
    "model.weights": "pretrained",
    "data": "alpaca",
    "batch_size": "1",
    "grad_accum_steps": "1",
    "seq_len": "512",
    "seed": "0",
    "vram_limit_gib": "None",
}
"""What a trial's params hold, in small."""

_OPTIM = {"adamw": "adamw_torch", "paged_adamw": "paged_adamw_8bit", "adamw_8bit": "adamw_8bit"}


def trial(
    metrics: Mapping[str, float] | None = None,
    *,
    outcome: str = "finished",
    sweep: str | None = "sweep0",
    repeat: int = 0,
    tags: Mapping[str, str] | None = None,
    device: str = "NVIDIA H100 80GB HBM3",
    unit: str = "GPU-1",
    regime: str | None = "GPU-bound",
    validity: str = "valid",
    **settings: str,
) -> Trial:
    """A trial with `settings` (params; "method.rank" is written method__rank), `metrics` and what else it is told."""
    number = next(_numbers)
    params = SETTINGS | {key.replace("__", "."): value for key, value in settings.items()}
    params |= {"optimizer.optim": _OPTIM.get(params["optimizer"], params["optimizer"])}
    params |= {"precision.dtype": params["precision"], "repeat": str(repeat), "seed": str(repeat)}
    fixed = {
        "outcome": outcome,
        "validity": validity,
        "device": device,
        "device.uuid": unit,
        "device.driver": "580.1",
        "version.torch": "2.11.0",
        "version.transformers": "5.17.0",
        "code": "abc",
        "commit": "0123456",
        "dirty": "false",
        "command": "python -m lora_lab " + " ".join(f"{key}={value}" for key, value in settings.items()),
        "ran.attention_kernel": "cudnn",
    }
    if regime is not None:
        fixed["regime"] = regime
    return Trial(
        run_id=f"run{number}",
        name=" ".join([params["optimizer"], params["precision"], f"{params['batch_size']}x{params['seq_len']}"]),
        sweep=sweep,
        outcome=outcome,
        params=params,
        metrics=dict(metrics or {}),
        tags=fixed | dict(tags or {}),
        started_ms=1_700_000_000_000 + 1000 * number,
    )


def factorial(
    levels: Mapping[str, Sequence[str]],
    effects: Mapping[str, float] | None = None,
    *,
    key: str = "throughput/tokens_per_second",
    base: float = 500.0,
    noise: float = 0.01,
    drift: float = 0.0,
    repeats: int = 3,
    missing: Sequence[str] = (),
    out_of_memory: Sequence[str] = (),
    regimes: Mapping[str, str] | None = None,
    sweep: str | None = "sweep0",
    random: int = 0,
) -> list[Trial]:
    """A sweep over `levels` ("shape": "1x512" sets batch_size and seq_len), whose figure `key` is known but for noise.

    Conditions are words that must all hold: "optimizer=paged_adamw precision=bf16", "repeat=2". An effect is added to
    the logarithm of `base` where its condition holds (with two words: an interaction); no trial is made where one of
    `missing` holds, and one without figures where one of `out_of_memory` does; `regimes` gives other regimes than
    GPU-bound. `noise` is the standard deviation of a trial's logarithm, `drift` that of a whole block's.
    """
    draw = np.random.default_rng(random)
    made = []
    for repeat in range(repeats):
        block = drift * draw.standard_normal()
        for choice in itertools.product(*levels.values()):
            log = math.log(base) + block + noise * draw.standard_normal()
            words = {f"{name}={level}" for name, level in zip(levels, choice, strict=True)} | {f"repeat={repeat}"}
            if _holds(missing, words):
                continue
            log += sum(effect for condition, effect in (effects or {}).items() if _holds([condition], words))
            settings = dict(zip(levels, choice, strict=True))
            if "shape" in settings:
                settings["batch_size"], settings["seq_len"] = settings.pop("shape").split("x")
            failed = _holds(out_of_memory, words)
            regime = next(
                (is_ for condition, is_ in (regimes or {}).items() if _holds([condition], words)), "GPU-bound"
            )
            outcome = "out_of_memory" if failed else "finished"
            metrics = {} if failed else {key: math.exp(log)}
            made.append(trial(metrics, outcome=outcome, sweep=sweep, repeat=repeat, regime=regime, **settings))
    return made


def _holds(conditions: Sequence[str], words: set[str]) -> bool:
    return any(set(condition.split()) <= words for condition in conditions)


def deliver(root: Path, trials: Sequence[Trial], name: str = "sweep of optimizer") -> str:
    """Trials as a store gets them, under the record of their sweep, into the local store at `root`; its address."""
    tracker = open_tracker(TrackingConfig(root=str(root)))
    for sweep in dict.fromkeys(trial.sweep for trial in trials if trial.sweep is not None):
        below = [trial for trial in trials if trial.sweep == sweep]
        params = {"points": "0", "trials": str(len(below)), "axis.optimizer": "adamw,paged_adamw"}
        tags = {"outcome": "finished", "command": "python -m lora_lab -m optimizer=adamw,paged_adamw"}
        above = Record(id=sweep, is_sweep=True, name=name, params=params, outcome="finished", tags=tags)
        tracker.deliver(above, [])
    for trial in trials:
        tracker.deliver(record(trial), [])
    return f"sqlite:///{root}/mlflow.db"


def record(of: Trial) -> Record:
    """What a tracker gets of a trial."""
    return Record(
        id=of.run_id,
        parent=of.sweep,
        name=of.name,
        outcome=of.outcome,
        started_ms=of.started_ms,
        ended_ms=of.started_ms + 60_000,
        params=dict(of.params),
        metrics=dict(of.metrics),
        tags={**of.tags, "outcome": of.outcome},
    )
