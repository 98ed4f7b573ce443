"""Name the figures that trials are compared by."""

import math
from dataclasses import dataclass, replace

from lora_lab.store.trials import Trial
from lora_lab.telemetry.metrics import METRICS, Metric
from lora_lab.telemetry.metrics import Better as Better


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A metric that trials are compared by: by ratios (on the log scale), or for loss by differences."""

    name: str
    """As on the command line: --objective energy."""
    metric: Metric
    better: Better
    ratios: bool = True

    @property
    def key(self) -> str:
        """Return its metric's key."""
        return self.metric.key

    @property
    def title(self) -> str:
        """Return its title."""
        return self.metric.title

    @property
    def unit(self) -> str:
        """Return its unit."""
        return self.metric.unit

    @property
    def form(self) -> str:
        """Return how a value is written."""
        return self.metric.form

    def of(self, trial: Trial) -> float | None:
        """Return the trial's figure; None where it is absent, or would mean nothing."""
        if self.name == "loss" and trial.params.get("model.weights") == "random":
            return None
        if self.name != "loss" and trial.is_member:
            return None
        value = _gpu_work(trial) if self.key == _GPU_WORK.key else trial.metrics.get(self.key)
        return None if value is None or not math.isfinite(value) or (self.ratios and value <= 0) else value

    def why_absent(self, trial: Trial) -> str:
        """Return why a trial has no such figure."""
        if self.name == "loss" and trial.params.get("model.weights") == "random":
            return "held-out loss says nothing about random weights"
        if self.name != "loss" and trial.is_member:
            return "it trained together with others (cotrain), and time, energy and memory are those of the whole job"
        if self.key == _GPU_WORK.key:
            return trial.tags.get(f"absent.{BUSY_SHARE}", "not recorded")
        if self.key in trial.metrics:
            return f"recorded as {trial.metrics[self.key]:g}, which cannot be compared"
        return trial.tags.get(f"absent.{self.key}", "not recorded")

    def write(self, value: float) -> str:
        """Return a value with its unit."""
        return self.metric.write(value)


BUSY_SHARE = "throughput/gpu_busy_share"
_GPU_WORK = Metric("gpu_work", "GPU work", "µs/token", "{:.4g}", Better.lower)
"""Time per real token in which the GPU itself works. It is not recorded: it follows from two figures that are."""


def _gpu_work(trial: Trial) -> float | None:
    """Return the microseconds per real token that the GPU works: its busy share / tokens per second.

    Per token and not per step, because a step of a larger shape is more work and no worse."""
    share, rate = (trial.metrics.get(key) for key in (BUSY_SHARE, "throughput/tokens_per_second"))
    return None if share is None or not rate else 1e6 * share / rate


def _measure(name: str, key: str, ratios: bool = True) -> Measure:
    found = METRICS[key]
    assert found.better is not None, "what trials are compared by has a better side"
    return Measure(name=name, metric=found, better=found.better, ratios=ratios)


THROUGHPUT = _measure("throughput", "throughput/tokens_per_second")
ENERGY = _measure("energy", "energy/joules_per_token")
VRAM = _measure("vram", "vram/peak_device_gib")
LOSS = _measure("loss", "loss/eval", ratios=False)
# three digits, because jobs of minutes are compared too
HOURS = Measure(
    name="hours",
    metric=replace(METRICS["job/hours"], title="hours of the job", form="{:.3g}"),
    better=Better.lower,
)
KWH = Measure(name="kwh", metric=replace(METRICS["job/kwh"], form="{:.3g}"), better=Better.lower)
COST = _measure("cost", "job/cost")
GPU_WORK = Measure(name="gpu_work", metric=_GPU_WORK, better=Better.lower)
OBJECTIVES = (THROUGHPUT, ENERGY, VRAM, LOSS)
"""What a configuration is chosen by, and what may get worse."""
OF_JOBS = (HOURS, KWH, COST)
"""What only a whole training has."""
MEASURES = (THROUGHPUT, GPU_WORK, ENERGY, VRAM, LOSS)
"""What a report compares: the objectives, and the GPU's part of the throughput."""
KNOWN = (*MEASURES, *OF_JOBS)
"""All measures."""
