"""Say what a sweep's trials will take, from what is known before it starts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lora_lab.config import TrialConfig
from lora_lab.forecast.display import in_one_line
from lora_lab.forecast.total import Asked, Total, speeds_of, total
from lora_lab.options import ClusterKind
from lora_lab.outcome import Outcome
from lora_lab.paths import MULTIRUN
from lora_lab.store.sweep_folder import Planned, outlines
from lora_lab.store.trials import Trial
from lora_lab.sweep.plan import GridPoint
from lora_lab.telemetry.nvml import Card
from lora_lab.trial.devices import choose_placement
from lora_lab.work import Workload


def rates_known(config: TrialConfig) -> bool:
    """Return whether the rates of a trial's card were measured here before."""
    card = _card(config)
    return card is not None and speeds_of(config, card) is not None


def forecast_line(points: Sequence[GridPoint], pending: Sequence[Planned], works: Mapping[str, Workload]) -> str:
    """Say in one line what the trials that are pending will take. No failure is raised: a sweep runs without it.

    Args:
        works: the work of points, by their digests, as far as it was counted.
    """
    try:
        return in_one_line(forecast_of(points, pending, works))
    except Exception as fault:
        return f"time: unknown (the forecast failed: {type(fault).__name__}: {fault})"


def forecast_of(points: Sequence[GridPoint], pending: Sequence[Planned], works: Mapping[str, Workload]) -> Total:
    """Forecast the trials that are pending.

    Args:
        works: the work of points, by their digests, as far as it was counted.
    """
    counts = Counter(trial.point for trial in pending)
    finished = [each for each in outlines(MULTIRUN) if each["outcome"] == Outcome.finished.value] if counts else []
    ran: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for outline in finished:
        ran.setdefault((outline["point"], outline["device"]), []).append(outline)
    others = [_trial(outline) for outline in finished]
    return total(
        Asked(
            config=point.config,
            count=counts[point.digest],
            card=_card(point.config),
            earlier=_valid(ran.get((point.digest, point.conditions["device"]), [])),
            others=others,
            work=works.get(point.digest),
        )
        for point in points
        if point.digest in counts
    )


def _valid(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out invalid trials, such as those that shared their device, unless there are no others."""
    return [trial for trial in trials if trial["tags"].get("validity") != "invalid"] or trials


def _trial(outline: Mapping[str, Any]) -> Trial:
    """Return a trial as the forecast compares its settings."""
    return Trial(
        run_id="",
        name=outline["name"],
        sweep=None,
        outcome=outline["outcome"],
        params=outline["params"],
        metrics=outline["metrics"],
        tags=outline["tags"] | {"device": outline["device"]},
        started_ms=0,
    )


def _card(config: TrialConfig) -> Card | None:
    if config.cluster.kind is not ClusterKind.local:
        return None  # the trials run on another one than is here
    return next(iter(choose_placement(config.device).cards), None)
