"""Adapters that train together on a real card learn what each learns alone, up to rounding."""

from pathlib import Path
from typing import Any

import pytest
from conftest import lab_in, records_in

pytestmark = pytest.mark.gpu

POINTS = (
    *("-m", "model=tiny", "data=random_tokens", "data.rows=16", "seq_len=128", "batch_size=2", "tracking=none"),
    *("method.rank=8,16", "learning_rate=1e-3,1e-2", "measure.warmup_steps=5", "measure.steps=20"),
    *("measure.idle_seconds=0", "cooldown_celsius=95", "share_device=true"),
)


def curves(folder: Path, *more: str) -> dict[tuple[str, str], list[float]]:
    """The losses of each point."""
    folder.mkdir()
    said = lab_in(folder, real=True)(*POINTS, *more)
    assert said.code == 0, said.text
    return {_point(record): _losses(record) for record in records_in(folder)}


def _point(record: dict[str, Any]) -> tuple[str, str]:
    return record["params"]["method.rank"], record["params"]["learning_rate"]


def _losses(record: dict[str, Any]) -> list[float]:
    return [point["value"] for point in record["series"] if point["key"] == "step/loss"]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_curves_together_are_those_alone(tmp_path: Path, method: str) -> None:
    alone = curves(tmp_path / "alone", f"method={method}")
    assert len(alone) == 4
    for engine in ("eager", "graph"):
        for loss in ("true", "false"):
            together = curves(
                tmp_path / f"{engine} {loss}",
                *(f"method={method}", f"engine={engine}", f"engine.chunked_loss={loss}"),
                "cotrain=rank,learning_rate",
            )
            for point, losses in alone.items():
                apart = [abs(one - other) for one, other in zip(together[point], losses, strict=True)]
                # at a rate of 1e-2 what is rounded otherwise grows from step to step: 0.039 after 25 steps on an H200
                grown = apart[15:] if point[1] == "0.01" else []
                assert max(apart[: len(apart) - len(grown)]) <= 0.03, (engine, loss, point)
                assert max(grown, default=0.0) < 0.06, (engine, loss, point)
    assert max(abs(a - b) for a, b in zip(alone["8", "0.001"], alone["16", "0.01"], strict=True)) > 0.1
