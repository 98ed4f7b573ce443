"""docs/measurement.md's table of the same trial again, from the stored trials of benchmarks/sweep/steady.yaml."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.reports import markdown, stored, where

TOKENS, JOULES, NET = "throughput/tokens_per_second", "energy/joules_per_token", "energy/net_joules_per_token"
WITHIN = 0.01


@dataclass(frozen=True, slots=True)
class Steady:
    """Equal trials."""

    shape: str
    metrics: Sequence[dict[str, float]]
    parts: Sequence[float]
    """J/token of each part of at least 5 s over that of its window, minus 1."""
    made: str
    """Card, date, commit."""

    def values(self, key: str, scale: float = 1) -> list[float]:
        return [scale * each[key] for each in self.metrics]

    def spread(self, key: str) -> float:
        """Return (highest - lowest) / median."""
        values = self.values(key)
        return (max(values) - min(values)) / statistics.median(values)

    @property
    def disagreement(self) -> float:
        """Return how far counter and integral of power are apart at most, as a share."""
        return max(map(abs, self.values("energy/power_disagreement")))

    @property
    def off(self) -> list[float]:
        """Return how far each part is off its window, as a share."""
        return [abs(part) for part in self.parts]

    @property
    def within(self) -> int:
        """Return how many parts are off by 1 % or less."""
        return sum(part <= WITHIN for part in self.off)


def steady_trials(name: str) -> Steady:
    """Return the trials of results/h100/steady_NAME.json."""
    content = stored(f"h100/steady_{name}")
    runs: list[dict[str, Any]] = content["runs"]
    records = [run["record"] for run in runs]
    params = records[0]["params"]
    return Steady(
        shape=f"{params['batch_size']}x{params['seq_len']}",
        metrics=[record["metrics"] for record in records],
        parts=[part for run in runs for part in run["parts"]],
        made=where(content["origin"], records[0]["started_ms"]),
    )


def steady() -> str:
    """Return the table: a column for the GPU-bound trials and one for the host-bound ones."""
    both = [steady_trials("gpu_bound"), steady_trials("host_bound")]
    columns = [_column(trials) for trials in both]
    rows = [[label, *(column[label] for column in columns)] for label in columns[0]]
    head = ["", *(f"{bound}, {trials.shape}" for bound, trials in zip(("GPU-bound", "host-bound"), both, strict=True))]
    return markdown(head, rows)


def _column(trials: Steady) -> dict[str, str]:
    count = f"{len(trials.metrics)} of {trials.metrics[0]['window/steps']:.0f} steps"
    errors = trials.values("throughput/tokens_per_second_error"), trials.values("energy/joules_per_token_error")
    return {
        "trials": count,
        "window, s": _range(trials.values("window/seconds"), ".0f"),
        "GPU busy, %": _range(trials.values("throughput/gpu_busy_share", 100), ".0f"),
        "tokens/s, median (lowest to highest)": _median(trials.values(TOKENS), ",.0f"),
        "its spread": f"{100 * trials.spread(TOKENS):.1f} %",
        "the error that a trial gives": _range(errors[0], ".0f"),
        "J/token, median (lowest to highest)": _median(trials.values(JOULES), ".4f"),
        "spread of J/token": f"{100 * trials.spread(JOULES):.1f} %",
        "the error of J/token that a trial gives": _range(errors[1], ".5f"),
        "net J/token, median (lowest to highest)": _median(trials.values(NET), ".4f"),
        "idle, W": _range(trials.values("energy/idle_watts"), ".0f"),
        "its bound, W": _range(trials.values("energy/idle_watts_error"), ".1f"),
        "counter and integral of power apart, at most": f"{100 * trials.disagreement:.1f} %",
        "parts of 5 s and more": str(len(trials.parts)),
        "their J/token off the window's, median (at most)": (
            f"{100 * statistics.median(trials.off):.1f} % ({100 * max(trials.off):.1f} %)"
        ),
        "of them within 1 %": str(trials.within),
        "card, date, commit": trials.made,
    }


def _range(values: Sequence[float], form: str) -> str:
    low, high = (f"{value:{form}}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _median(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({_range(values, form)})"
