"""Fit the forecast's constants on stored trials and judge them on others: python -m benchmarks.forecast_fit

It writes lora_lab/forecast/fitted.json. A cell is judged by a fit that has not seen its model; Qwen2.5-1.5B, of which
most cells are, is split by the tokens of a step instead. The parts of a step and where the fit begins were chosen while
looking at all cells, so the errors are somewhat too small."""

import json
import math
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from benchmarks.forecast_cells import (
    ATTAINED,
    BOARD_WATTS,
    MEMORY_BYTES_PER_SECOND,
    Cell,
    cells,
    cpu_cells,
    repeated_steps,
)
from lora_lab.forecast.roofline import Roofline, Speeds, StepTime

FILE = Path(__file__).parents[1] / "lora_lab" / "forecast" / "fitted.json"
PRIOR = 0.3
"""The weight of a constant's distance from its start, next to a residual: both are logarithms. Without it the few cells
could not separate some of the constants."""
COVERAGE = 0.9

_CARD = {
    "products": (1.25, 1.0, 2.5),
    "attention": (1.5, 0.9, 4.0),
    "layers_eager": (4.0, 0.3, 40.0),
    "layers_liger": (3.0, 0.3, 40.0),
    "layers_compile": (2.0, 0.3, 40.0),
    "layers_graph": (1.0, 0.1, 40.0),
    "logits_whole": (10.0, 1.0, 40.0),
    "logits_chunked": (2.0, 0.2, 40.0),
    "weights": (1.0, 0.1, 4.0),
    "unpacking_eager": (1.8, 0.5, 8.0),
    "unpacking_liger": (1.8, 0.5, 8.0),
    "unpacking_compile": (1.3, 0.5, 8.0),
    "unpacking_graph": (1.3, 0.5, 8.0),
    "floor_eager": (5e-5, 1e-6, 1e-3),
    "floor_liger": (5e-5, 1e-6, 1e-3),
    "floor_compile": (3e-5, 1e-6, 1e-3),
    "floor_graph": (2e-5, 1e-6, 1e-3),
    "raised_whole": (8.0, 1.0, 60.0),
    "raised_chunked": (4.0, 1.0, 60.0),
    "raised_layers": (2.0, 0.1, 60.0),
}
_HOST = {
    "host_eager": (1.5e-3, 1e-4, 1e-2),
    "host_liger": (1.5e-3, 1e-4, 1e-2),
    "host_compile": (1.0e-3, 1e-4, 1e-2),
    "host_graph": (5e-5, 1e-6, 1e-3),
    "host_16_bit": (0.75, 0.3, 1.0),
    "host_repeated": (0.45, 0.0, 1.5),
    "host_raised": (1.05, 0.9, 1.5),
    "waiting_step": (2e-3, 0.0, 0.1),
    "waiting_bitsandbytes": (9e-5, 0.0, 1e-3),
    "waiting_scaler": (1e-5, 0.0, 1e-3),
}
START = {**_CARD, **_HOST}
"""Where the fit begins, from what each part reads, writes and multiplies, and the least and most that is allowed."""


START_CPU = {
    "products": (1.3, 0.7, 10.0),
    "attention": (3.0, 0.9, 30.0),
    "layers_eager": (6.0, 0.3, 60.0),
    "logits_whole": (6.0, 0.3, 60.0),
    "weights": (1.0, 0.1, 10.0),
    "unpacking_eager": (6.0, 0.3, 200.0),
    "floor_eager": (1e-3, 1e-5, 1e-1),
    "waiting_step": (1e-2, 1e-4, 3e-2),
}
_NOT_ON_A_CPU = dict.fromkeys(
    (
        *("host_eager", "host_compile", "host_16_bit", "host_repeated", "host_raised"),
        *("waiting_bitsandbytes", "waiting_scaler", "raised_whole", "raised_chunked", "raised_layers"),
    ),
    0.0,
)
"""A CPU launches its own work: the time of that is in the floor. What is raised to fp32 was not measured on one."""
_AS_EAGER = {
    "logits_chunked": "logits_whole",
    "layers_compile": "layers_eager",
    "unpacking_compile": "unpacking_eager",
    "floor_compile": "floor_eager",
}
"""Not measured on a CPU, and taken to be as eager's."""


def predicted(cell: Cell, fitted: dict[str, float]) -> StepTime:
    """Return the time of a cell's step."""
    speeds = Speeds(cell.matmul, MEMORY_BYTES_PER_SECOND[cell.card] * ATTAINED)
    return Roofline(cell.config, cell.facts, speeds, fitted).step([cell.batch])


def fit(measured: Sequence[Cell], begin: dict[str, tuple[float, float, float]] | None = None) -> dict[str, float]:
    """Return the constants with which the logarithms of card and step time are off least.

    Args:
        begin: where the fit begins, and the least and most of each constant; START by default.
    """
    begin = START if begin is None else begin
    names = list(begin)
    rest = {} if begin is START else _NOT_ON_A_CPU

    def residuals(logs: Any) -> list[float]:
        fitted = dict(zip(names, np.exp(logs), strict=True)) | rest
        off = list[float]()
        for cell in measured:
            time = predicted(cell, fitted)
            off.append(math.log(time.seconds / cell.step_seconds))
            if cell.busy_seconds:
                off.append(math.log(time.card / cell.busy_seconds))
        return [*off, *(PRIOR * (log - math.log(begin[name][0])) for name, log in zip(names, logs, strict=True))]

    start = [math.log(begin[name][0]) for name in names]
    low = [math.log(max(begin[name][1], 1e-7)) for name in names]
    high = [math.log(begin[name][2]) for name in names]
    found = least_squares(residuals, start, bounds=(low, high), loss="soft_l1", f_scale=0.1)
    return {name: float(f"{value:.4g}") for name, value in zip(names, np.exp(found.x), strict=True)} | rest


def fold(cell: Cell) -> str:
    """Return the group that a cell is held out with."""
    return f"Qwen {cell.batch.slots}" if "Qwen" in cell.model else cell.model


def held_out(every: Sequence[Cell]) -> list[tuple[Cell, StepTime]]:
    """Return each cell with its time by a fit that has not seen its group."""
    found = []
    for name in sorted({fold(cell) for cell in every}):
        fitted = fit([cell for cell in every if fold(cell) != name])
        found += [(cell, predicted(cell, fitted)) for cell in every if fold(cell) == name]
    return found


def summary(errors: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Return the table's row for errors of the logarithm, each with its group.

    `half`, half the interval, is the size that COVERAGE of the errors do not pass; `covered` is the share of errors
    within the interval that all groups but their own make."""
    sizes = [(group, abs(off)) for group, off in errors]

    def half_without(left_out: str) -> float:
        return float(np.quantile([off for group, off in sizes if group != left_out], COVERAGE))

    halves = {group: half_without(group) for group, _ in sizes}
    every = [abs(math.expm1(off)) for _, off in errors]
    return {
        "cells": len(errors),
        "median": round(float(np.median(every)), 3),
        "p90": round(float(np.quantile(every, 0.9)), 3),
        "worst": round(max(every), 3),
        "half": round(half_without(""), 4),
        "covered": round(float(np.mean([off <= halves[group] for group, off in sizes])), 3),
    }


def on_cpu() -> dict[str, Any]:
    """Return a CPU's constants, each cell judged by a fit without it."""
    every = cpu_cells()
    off = []
    for cell in every:
        fitted = fit([other for other in every if other is not cell], START_CPU)
        off.append((_same(cell), math.log(predicted(cell, fitted).seconds / cell.step_seconds)))
        print(f"CPU {math.expm1(off[-1][1]):+.0%} of {cell.step_seconds:.3f} s: {_same(cell)[:300]}")
    fitted = fit(every, START_CPU)
    return {"constants": fitted | {name: fitted[like] for name, like in _AS_EAGER.items()}, "judged": summary(off)}


def power(judged: Sequence[tuple[Cell, StepTime]]) -> dict[str, Any]:
    """Return the card's power as a share of its limit: base + slope x (card's share of the step), by least squares."""
    known = [(cell, time.card / time.seconds) for cell, time in judged if cell.watts]
    shares = [(cell.watts or 0.0) / BOARD_WATTS for cell, _ in known]
    weights = 1 / np.array(shares)
    columns = np.array([[1.0, busy] for _, busy in known])
    (base, slope), *_ = np.linalg.lstsq(columns * weights[:, None], np.array(shares) * weights, rcond=None)
    off = [(fold(c), math.log((base + slope * busy) / share)) for (c, busy), share in zip(known, shares, strict=True)]
    return {"base": round(float(base), 4), "slope": round(float(slope), 4), "judged": summary(off)}


def between_repeats() -> dict[str, dict[str, float]]:
    """Return how far a trial's step time is from that of the repeat before it, as a probe's is from its job's."""
    off: dict[str, list[tuple[str, float]]] = {"card": [], "host": []}
    for group, regime, steps in repeated_steps():
        off[regime] += [(group, math.log(after / before)) for before, after in pairwise(steps)]
    return {regime: summary(some) for regime, some in off.items()}


def between_sessions(judged: Sequence[tuple[Cell, StepTime]]) -> dict[str, dict[str, float]]:
    """Return how far the same configuration's step times are apart on two machines with the same card."""
    off: dict[str, list[tuple[str, float]]] = {"card": [], "host": []}
    cells_of: dict[str, list[tuple[Cell, StepTime]]] = {}
    for cell, time in judged:
        cells_of.setdefault(_same(cell), []).append((cell, time))
    for key, same in cells_of.items():
        for (one, time), (other, _) in combinations(same, 2):
            if one.session != other.session:
                off[regime(time)].append((key, math.log(one.step_seconds / other.step_seconds)))
    return {name: summary(some) for name, some in off.items()}


def regime(time: StepTime) -> str:
    """Return which of the two takes longer by the roofline: card or host."""
    return "card" if time.card >= time.host else "host"


def _same(cell: Cell) -> str:
    c = cell.config
    parts = (cell.card, cell.model, c.engine.kind, c.method, c.precision, c.optimizer.optim, c.gradient_checkpointing)
    return f"{parts} {cell.batch}"


def main() -> None:
    """Fit, judge, write the file and print the errors."""
    every = cells()
    judged = held_out(every)
    found = {
        "cards": sorted({cell.card for cell in every}),
        "constants": fit(every),
        "cpu": on_cpu(),
        "roofline": {
            name: summary(
                [(fold(c), math.log(time.seconds / c.step_seconds)) for c, time in judged if regime(time) == name]
            )
            for name in ("card", "host")
        },
        "probe": between_repeats(),
        "stored": between_sessions(judged),
        "power": power(judged),
    }
    FILE.write_text(json.dumps(found, indent=2) + "\n")
    for cell, time in judged:
        off = time.seconds / cell.step_seconds - 1
        if abs(off) > 0.15:
            print(f"{off:+.0%} {cell.session}: {_same(cell)[:200]}")
    print(json.dumps({k: v for k, v in found.items() if k not in ("constants", "cpu")}, indent=1))


if __name__ == "__main__":
    main()
