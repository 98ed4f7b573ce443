"""Fit the forecast's constants on stored trials and judge them on others: python -m benchmarks.forecast_fit"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import least_squares

from benchmarks.forecast_cells import ATTAINED, MEMORY_BYTES_PER_SECOND, Cell, cells
from lora_lab.forecast.roofline import Roofline, Speeds

CARD = {
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
HOST = {
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
PRIOR = float(__import__("os").environ.get("PRIOR", "0.1"))
START = {**CARD, **HOST}


def predicted(cell: Cell, fitted: dict[str, float]) -> tuple[float, float]:
    """Return the seconds of a cell's step, and those of the card in it."""
    speeds = Speeds(cell.matmul, MEMORY_BYTES_PER_SECOND[cell.card] * ATTAINED)
    found = Roofline(cell.config, cell.facts, speeds, fitted).step([cell.batch])
    return found.seconds, found.card


def fit(measured: Sequence[Cell]) -> dict[str, float]:
    """Return the constants with which the logarithms of card and step time are off least."""
    names = list(START)

    def residuals(logs: np.ndarray) -> list[float]:
        fitted = dict(zip(names, np.exp(logs), strict=True))
        off = []
        for cell in measured:
            seconds, card = predicted(cell, fitted)
            off.append(math.log(seconds / cell.step_seconds))
            if cell.busy_seconds:
                off.append(math.log(card / cell.busy_seconds))
        # without evidence a constant stays where it begins
        return [*off, *(PRIOR * (log - math.log(START[name][0])) for name, log in zip(names, logs, strict=True))]

    start = [math.log(START[name][0]) for name in names]
    low = [math.log(max(START[name][1], 1e-7)) for name in names]
    high = [math.log(START[name][2]) for name in names]
    found = least_squares(residuals, start, bounds=(low, high), loss="soft_l1", f_scale=0.1)
    return dict(zip(names, np.exp(found.x).tolist(), strict=True))


if __name__ == "__main__":
    every = cells()
    qwen = [cell for cell in every if "Qwen" in cell.model]
    fitted = fit(qwen)
    print({k: round(v, 6) for k, v in fitted.items()})
    for cell in every:
        seconds, card = predicted(cell, fitted)
        c = cell.config
        print(
            f"{cell.model[-22:]:22} {cell.session[:30]:30} {cell.card} {c.engine.kind.name:7} {c.method.quantization.name:4} {'R' if c.method.raise_to_fp32 else '-'} {c.precision.dtype.name} {str(c.optimizer.optim)[:12]:12} "
            f"{c.gradient_checkpointing.name:9} {cell.batch.rows}x{cell.batch.width:5} step {cell.step_seconds:.4f} {100 * (seconds / cell.step_seconds - 1):+6.1f}%"
            + (f"  busy {cell.busy_seconds:.4f} {100 * (card / cell.busy_seconds - 1):+6.1f}%" if cell.busy_seconds else "")
        )
