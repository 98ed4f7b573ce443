"""Simulated sessions, and how often the product's intervals hold the truth in them. Seeded, so always the same.

Effects and noise are in units of the noise of one pair of trials, unless said otherwise. The true effect is 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import signal, stats

from lora_lab.events import Step
from lora_lab.report.statistics.averages import Average, average
from lora_lab.report.statistics.differences import Difference
from lora_lab.report.statistics.estimates import Estimate
from lora_lab.report.statistics.pooling import random_effects
from lora_lab.telemetry.throughput import rate_error

Array = NDArray[np.float64]


@dataclass
class Tally:
    """How often an interval held 0, and its mean half-width."""

    draws: int = 0
    held: int = 0
    reach: float = 0.0

    def add(self, found: Estimate) -> None:
        assert found.low is not None
        assert found.high is not None
        self.add_ends(found.low, found.high)

    def add_ends(self, low: float, high: float, truth: float = 0.0) -> None:
        self.draws += 1
        self.held += bool(low <= truth <= high)
        self.reach += (high - low) / 2

    @property
    def coverage(self) -> float:
        return self.held / self.draws

    @property
    def mean_reach(self) -> float:
        return self.reach / self.draws


def averages(cells: int, blocks: int, block_sd: float, draws: int, seed: int = 0) -> dict[str, Any]:
    """Simulate contrasts over a grid. A block shifts the difference in all its cells by `block_sd`."""
    draw = np.random.default_rng(seed)
    session, over_blocks, headline = Tally(), Tally(), Tally()
    for _ in range(draws):
        made = _average(_pairs(draw, cells, blocks, block_sd))
        session.add(made.this_session)
        headline.add(made.estimate)
        over_blocks.add(made.this_session if made.by_blocks is None else made.by_blocks)
    return {
        "cells": cells,
        "blocks": blocks,
        "block_sd": block_sd,
        "draws": draws,
        "this_session": session.coverage,
        "over_blocks": over_blocks.coverage,
        "sessions_like_it": headline.coverage,
        "width_this_session": session.mean_reach / _exact(cells * (blocks - 1), 1 / math.sqrt(cells * blocks)),
        "width_over_blocks": over_blocks.mean_reach / _exact(blocks - 1, _error(cells, blocks, block_sd)),
        "width_sessions_like_it": headline.mean_reach / _exact(blocks - 1, _error(cells, blocks, block_sd)),
        "reach": headline.mean_reach,
    }


def orders(order: str, noise: str, draws: int, seed: int = 0, cells: int = 12, blocks: int = 3) -> dict[str, Any]:
    """Simulate trials one after the other on a machine that drifts. The noise of a trial is 7.6 %.

    Args:
        order: random (as a sweep runs them), or one level after the other within each block.
        noise: what the machine does: correlated, drift, slow spells."""
    draw = np.random.default_rng(seed)
    session, headline = Tally(), Tally()
    for _ in range(draws):
        trials = cells * 2
        machine = np.concatenate([_machine(draw, noise, trials) for _ in range(blocks)]).reshape(blocks, trials)
        apart = np.empty((cells, blocks))
        for block in range(blocks):
            places = draw.permutation(trials) if order == "random" else np.arange(trials)
            figures = 0.076 * machine[block][places]
            apart[:, block] = figures[cells:] - figures[:cells]
        made = _average(apart)
        session.add(made.this_session)
        headline.add(made.estimate)
    return {
        "order": order,
        "noise": noise,
        "draws": draws,
        "this_session": session.coverage,
        "sessions_like_it": headline.coverage,
    }


def hosts(count: int, host_sd: float, draws: int, seed: int = 0, cells: int = 4, blocks: int = 5) -> dict[str, Any]:
    """Simulate one session on each of `count` hosts, whose own effects differ by `host_sd` times a session's error."""
    draw = np.random.default_rng(seed)
    alone, mean, another = Tally(), Tally(), Tally()
    error = 1 / math.sqrt(cells * blocks)
    for _ in range(draws):
        own = host_sd * error * draw.standard_normal(count + 1)
        made = [_average(_pairs(draw, cells, blocks, 0.0) + own[host]) for host in range(count)]
        alone.add(made[0].estimate)
        errors = [each.this_session.error or 0.0 for each in made]
        pooled = random_effects([each.estimate.value for each in made], errors)
        mean.add(pooled.estimate)
        if pooled.prediction is not None:
            another.add_ends(*pooled.prediction, truth=own[count])
    return {
        "hosts": count,
        "host_sd": host_sd,
        "draws": draws,
        "one_session": alone.coverage,
        "pooled": mean.coverage,
        "prediction": another.coverage if another.draws else None,
        "width_pooled": mean.mean_reach / _exact(count - 1, error * math.sqrt((1 + host_sd**2) / count)),
    }


def windows(steps: int, correlation: float, draws: int, seed: int = 0) -> dict[str, Any]:
    """Simulate windows whose step times are correlated with the one before: mean 1 s, sd 5 %, equal rows."""
    draw = np.random.default_rng(seed)
    held, reach = 0, 0.0
    for _ in range(draws):
        seconds = 1 + 0.05 * _correlated(draw, steps, correlation)
        error = rate_error([_step(each) for each in seconds.tolist()])
        assert error is not None
        held += bool(abs(_TOKENS * steps / float(seconds.sum()) - _TOKENS) <= error)
        reach += error / _TOKENS
    independent = 0.05 * math.sqrt((1 + correlation) / (1 - correlation) / steps)
    exact = float(stats.norm.isf(0.025)) * independent
    return {
        "steps": steps,
        "correlation": correlation,
        "draws": draws,
        "coverage": held / draws,
        "width": reach / draws / exact,
    }


_TOKENS = 1000


def _pairs(draw: np.random.Generator, cells: int, blocks: int, block_sd: float) -> Array:
    """Return the differences of pairs, cells x blocks."""
    return draw.standard_normal((cells, blocks)) + block_sd * draw.standard_normal(blocks)


def _average(pairs: Array) -> Average:
    samples = [{("sweep", block): float(value) for block, value in enumerate(cell)} for cell in pairs]
    return average([Difference(value=float(np.mean(list(each.values()))), samples=(each,)) for each in samples])


def _error(cells: int, blocks: int, block_sd: float) -> float:
    """Return the true standard error of the average."""
    return math.sqrt((block_sd**2 + 1 / cells) / blocks)


def _exact(df: int, error: float) -> float:
    """Return the mean half-width of Student's exact interval: its quantile times the mean of an estimated error."""
    c4 = math.sqrt(2 / df) * math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2))
    return float(stats.t.isf(0.025, df)) * c4 * error


def _correlated(draw: np.random.Generator, size: int, correlation: float) -> Array:
    """Return noise with variance 1, each correlated with the one before."""
    fresh = draw.standard_normal(size) * math.sqrt(1 - correlation**2)
    fresh[0] = draw.standard_normal()
    return np.asarray(signal.lfilter([1.0], [1.0, -correlation], fresh))


def _machine(draw: np.random.Generator, noise: str, trials: int) -> Array:
    """Return what a machine adds to each trial of a block, in the order of time, in units of a trial's noise."""
    if noise == "correlated":
        return _correlated(draw, trials, 0.6)
    own = draw.standard_normal(trials)
    if noise == "drift":
        return own + np.linspace(0.0, 0.10 / 0.076, trials)
    spell = draw.integers(0, trials - 6)
    own[spell : spell + 6] -= 0.2 / 0.076
    return own


def _step(seconds: float) -> Step:
    return Step(
        t=0.0, step=0, seconds=seconds, loss=0.0, rows=1, slots=_TOKENS, real=_TOKENS, trained=_TOKENS, skipped=False
    )


def every(small: float = 1.0) -> dict[str, list[dict[str, Any]]]:
    """Run everything; with `small` below 1 with that share of the draws."""

    def often(draws: int) -> int:
        return max(1, round(small * draws))

    grids: Sequence[tuple[int, int]] = ((12, 3), (12, 5), (4, 3), (4, 5), (2, 5), (1, 5))
    sds = (0.0, 0.2, 0.4, 1.0)
    return {
        "averages": [
            averages(cells, blocks, sd, often(4000), seed=100 * cells + 10 * blocks + number)
            for cells, blocks in grids
            for number, sd in enumerate(sds)
        ],
        "repeats": [averages(4, blocks, 0.4, often(4000), seed=blocks) for blocks in (3, 4, 5, 6, 8, 10)],
        "orders": [
            orders(order, noise, often(2000))
            for order in ("random", "one level first")
            for noise in ("correlated", "drift", "slow spells")
        ],
        "hosts": [hosts(count, sd, often(2000)) for count in (2, 3, 5) for sd in (0.0, 0.5, 1.0, 2.0)],
        "windows": [
            windows(steps, correlation, often(4000))
            for steps in (20, 30, 40, 200)
            for correlation in (0, 0.3, 0.6, 0.8)
        ],
    }
