"""How far off the estimates of memory were that trials' records hold, and which of their verdicts were wrong."""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lora_lab.outcome import Outcome
from lora_lab.phase import Phase
from lora_lab.report.answers.pareto import Point
from lora_lab.store.trials import Trial
from lora_lab.telemetry.metrics import Metric, metric

VERDICT = "estimate_verdict"
"""The tag that says whether a trial was said to fit its card."""
FITS, TOO_LARGE = "fits", "too large"
_CARD = "estimate/card_error"
_ERRORS = (_CARD, "estimate/reserved_error", "estimate/allocated_error")
"""The first that some trial has is shown: what counts first is what the process takes of the card."""
_ESTIMATED = [phase.value for phase in (Phase.model, Phase.compilation, Phase.warm_up, Phase.window)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Shares by which estimates were off."""

    of: Metric
    """What was estimated."""
    trials: int
    mean: float
    """Of their sizes."""
    worst: float
    worst_at: int
    """Place of its point."""
    within: int | None
    """Trials whose process' peak was within the interval; None where it was not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimates:
    """What became of the estimates. Places are those of points."""

    errors: Errors | None
    """None where no trial can be compared."""
    apart: Mapping[str, int]
    """How many trials that finished cannot be compared, by reason."""
    fits_but_ran_out: tuple[int, ...]
    """Places of points that were said to fit and ran out of memory in what is estimated: loading and steps."""
    ran_out_elsewhere: tuple[int, ...]
    """Those that ran out of memory in another phase."""
    too_large_but_finished: tuple[int, ...]
    """Places of points that were said to be too large and finished, with full rows."""


def estimates(points: Sequence[Point]) -> Estimates | None:
    """Return what became of the estimates; None where no trial that finished or ran out of memory has one.

    Invalid trials are left out: other programs may have taken their memory."""
    found = [(place, trial) for place, point in enumerate(points) for trial in point.trials if _counts(trial)]
    if not found:
        return None
    key = next((key for key in _ERRORS if any(key in trial.metrics for _, trial in found)), None)
    without = (trial for _, trial in found if trial.finished and key not in trial.metrics)
    reasons = (trial.tags.get(f"absent.{key or _CARD}", "not recorded") for trial in without)
    return Estimates(
        errors=None if key is None else _errors(key, found),
        apart=Counter(reason.partition(":")[0] for reason in reasons),
        fits_but_ran_out=_places(found, lambda trial: _ran_out(trial) and _is_estimated(trial)),
        ran_out_elsewhere=_places(found, lambda trial: _ran_out(trial) and not _is_estimated(trial)),
        too_large_but_finished=_places(found, _finished_all_the_same),
    )


def _counts(trial: Trial) -> bool:
    ended = trial.outcome in (Outcome.finished.value, Outcome.out_of_memory.value)
    return ended and VERDICT in trial.tags and trial.tags.get("validity") != "invalid"


def _errors(key: str, found: Sequence[tuple[int, Trial]]) -> Errors:
    off = [(trial.metrics[key], place) for place, trial in found if key in trial.metrics]
    worst, worst_at = max(off, key=lambda one: abs(one[0]))
    of_card = [trial.metrics for _, trial in found if _CARD in trial.metrics]
    return Errors(
        of=metric(key.replace("_error", "_gib")),
        trials=len(off),
        mean=statistics.mean(abs(error) for error, _ in off),
        worst=worst,
        worst_at=worst_at,
        within=sum(map(_is_within, of_card)) if of_card else None,
    )


def _is_within(metrics: Mapping[str, float]) -> bool:
    measured = metrics["estimate/card_gib"] / (1 + metrics[_CARD])
    return metrics["estimate/low_gib"] <= measured <= metrics["estimate/high_gib"]


def _ran_out(trial: Trial) -> bool:
    return trial.tags[VERDICT] == FITS and trial.outcome == Outcome.out_of_memory.value


def _is_estimated(trial: Trial) -> bool:
    """Return whether a trial ended in a phase whose memory is estimated."""
    return trial.tags.get("phase") in _ESTIMATED


def _finished_all_the_same(trial: Trial) -> bool:
    """Return whether a trial finished that was said to be too large. With shorter rows it needed less, and the error
    of its live tensors is absent."""
    return trial.tags[VERDICT] == TOO_LARGE and trial.finished and _ERRORS[-1] in trial.metrics


def _places(found: Sequence[tuple[int, Trial]], is_one: Callable[[Trial], bool]) -> tuple[int, ...]:
    """Return the places of the points that have such a trial."""
    return tuple(dict.fromkeys(place for place, trial in found if is_one(trial)))
