"""What trials are compared by: a figure, its unit, and which way is better."""

import math
from dataclasses import dataclass
from enum import Enum

from lora_lab.store.trials import Trial


class Better(Enum):
    """Which way is better."""

    higher = "higher"
    lower = "lower"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One figure of a trial. Ratios are compared (on the log scale), but for loss, where it is differences."""

    name: str
    """As on the command line: --objective energy."""
    key: str
    """Its metric."""
    title: str
    unit: str
    better: Better
    form: str
    """How a value is written."""
    ratios: bool = True

    def of(self, trial: Trial) -> float | None:
        """The trial's figure; None where it is absent, or where it would mean nothing."""
        if self.name == "loss" and trial.params.get("model.weights") == "random":
            return None
        value = trial.metrics.get(self.key)
        return None if value is None or not math.isfinite(value) or (self.ratios and value <= 0) else value

    def why_absent(self, trial: Trial) -> str:
        """Why a trial has no such figure."""
        if self.name == "loss" and trial.params.get("model.weights") == "random":
            return "held-out loss says nothing of random weights"
        if self.key in trial.metrics:
            return f"recorded as {trial.metrics[self.key]:g}, which can't be compared"
        return trial.tags.get(f"absent.{self.key}", "not recorded")

    def write(self, value: float) -> str:
        """A value with its unit."""
        return f"{self.form.format(value)} {self.unit}"


THROUGHPUT = Measure(
    name="throughput",
    key="throughput/tokens_per_second",
    title="throughput",
    unit="tokens/s",
    better=Better.higher,
    form="{:,.0f}",
)
ENERGY = Measure(
    name="energy",
    key="energy/joules_per_token",
    title="energy a token",
    unit="J/token",
    better=Better.lower,
    form="{:.4f}",
)
VRAM = Measure(
    name="vram",
    key="vram/peak_device_gib",
    title="VRAM, card's peak",
    unit="GiB",
    better=Better.lower,
    form="{:.2f}",
)
LOSS = Measure(
    name="loss",
    key="loss/eval",
    title="held-out loss",
    unit="nats a token",
    better=Better.lower,
    form="{:.4f}",
    ratios=False,
)
MEASURES = (THROUGHPUT, ENERGY, VRAM, LOSS)
