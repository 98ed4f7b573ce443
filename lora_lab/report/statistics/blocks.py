"""Which trials may be compared: their figures, their blocks, and what else was set differently."""

import math
import statistics
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from lora_lab.report.measures import BUSY_SHARE, VRAM, Measure
from lora_lab.report.statistics.cards import Placed, card_effects
from lora_lab.report.statistics.factors import NO_EFFECT, Factor
from lora_lab.store.trials import Trial
from lora_lab.telemetry.throughput import regime_at

NOT_KNOWN = "not known"
"""The regime of trials whose GPU could not be observed."""

Block = tuple[str, int]
"""What ran close together in time: the sweep's run id and the repeat. Trials of no sweep have "" and a number."""

_LEFT_OVER = ("hydra", "sweep")
"""What a launcher may leave among the settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialFigure:
    """One trial's figure, on the scale that differences are taken on."""

    trial: Trial
    block: Block
    value: float
    """The natural logarithm for measures that are compared by ratios, else the figure itself."""


def figures(trials: Sequence[Trial], measure: Measure) -> list[TrialFigure]:
    """Return the figures of the trials that have one, by their start. Of a sweep that ran on several cards those of a
    ratio are without what the cards add, where that can be told."""
    found = _plain_figures(trials, measure)
    added = _of_cards(found, measure)
    return [replace(each, value=each.value - added.get(each.trial.run_id, 0.0)) for each in found]


def between_cards(trials: Sequence[Trial], measure: Measure) -> float | None:
    """Return how far apart the cards of a sweep are in a measure, on the scale that differences are taken on; None
    where that cannot be told, or it is not taken out of the figures."""
    added = _of_cards(_plain_figures(trials, measure), measure)
    return max(added.values()) - min(added.values()) if added else None


def _of_cards(found: Sequence[TrialFigure], measure: Measure) -> dict[str, float]:
    """Return what the card adds to each trial's figure, by run id, in sweeps on several cards. Neither memory, which
    repeats to the byte, nor a loss is the card's."""
    if not measure.ratios or measure == VRAM or len({each.trial.card for each in found}) < 2:
        return {}
    points = settings_besides([each.trial for each in found], ())
    of_sweep: dict[str, list[Placed]] = {}
    for each, point in zip(found, points, strict=True):
        if each.trial.sweep is not None and each.trial.card:
            placed = Placed(each.trial.run_id, point, each.trial.repeat, each.trial.card, each.value)
            of_sweep.setdefault(each.trial.sweep, []).append(placed)
    return {run_id: value for placed in of_sweep.values() for run_id, value in card_effects(placed).items()}


def _plain_figures(trials: Sequence[Trial], measure: Measure) -> list[TrialFigure]:
    ordered = sorted(trials, key=lambda trial: (trial.started_ms, trial.run_id))
    found = []
    for trial, block in zip(ordered, _blocks(ordered), strict=True):
        value = measure.of(trial)
        if value is not None:
            found.append(TrialFigure(trial=trial, block=block, value=math.log(value) if measure.ratios else value))
    return found


def settings_besides(trials: Sequence[Trial], factors: Sequence[Factor]) -> list[tuple[str, ...]]:
    """Return each trial's settings other than `factors`: trials are alike if these are equal.

    A group's choice brings its leaves with it (optimizer=paged_adamw sets optimizer.optim), so a setting above or
    below one of a factor's is passed over where it follows from that one in all trials. Settings that are the same in
    all trials are passed over too: they separate nothing."""
    own = {key for factor in factors for key in factor.keys}
    kept = [key for key in varied(trials) if key not in own and not any(_follows(key, one, trials) for one in own)]
    return [tuple(trial.params.get(key, "None") for key in kept) for trial in trials]


def varied(trials: Collection[Trial]) -> list[str]:
    """Return the settings that differ and can change what is measured, in alphabetical order."""
    keys = {key for trial in trials for key in trial.params if _matters(key)}
    return sorted(key for key in keys if len({trial.params.get(key, "None") for trial in trials}) > 1)


def regime_of(trials: Collection[Trial]) -> str:
    """Return the regime of these trials: by the mean of their busy shares; without shares the one they all ran in, else
    "mixed"; "not known" where none has either.

    By the mean, because which side of a limit a single trial falls on is itself an outcome: to ask that all trials fall
    on one side leaves out the slower ones of one level and the faster ones of the other."""
    shares = [trial.metrics[BUSY_SHARE] for trial in trials if BUSY_SHARE in trial.metrics]
    if shares:
        return regime_at(statistics.fmean(shares))
    regimes = {trial.regime for trial in trials} - {NOT_KNOWN}
    if not regimes:
        return NOT_KNOWN
    return regimes.pop() if len(regimes) == 1 else "mixed"


def regime_between(over: Collection[Trial], of: Collection[Trial]) -> str:
    """Return the regime of a change; "GPU-bound to host-bound" if it moved the trials from one to the other.

    A change that makes the card wait is as much an effect as one that makes it slower."""
    before, after = regime_of(over), regime_of(of)
    if before == after or not {before, after} <= {"host-bound", "GPU-bound"}:
        return regime_of([*over, *of])
    return f"{before} to {after}"


def _matters(key: str) -> bool:
    return not {key, key.split(".")[0]} & {*NO_EFFECT, *_LEFT_OVER}


def _follows(key: str, other: str, trials: Sequence[Trial]) -> bool:
    """Return whether `key` is above or below `other`, and every value of `other` comes with one value of `key`."""
    if not (key.startswith(f"{other}.") or other.startswith(f"{key}.")):
        return False
    pairs = {(trial.params.get(other, "None"), trial.params.get(key, "None")) for trial in trials}
    return len(pairs) == len({value for value, _ in pairs})


def _blocks(ordered: Sequence[Trial]) -> list[Block]:
    """Return each trial's block. Trials of no sweep are numbered within their point, so that the first of one point
    meets the first of another."""
    settings = settings_besides(ordered, ())
    alone: Counter[tuple[str, ...]] = Counter()
    blocks = []
    for trial, setting in zip(ordered, settings, strict=True):
        if trial.sweep is not None:
            blocks.append((trial.sweep, trial.repeat))
        else:
            blocks.append(("", alone[setting]))
            alone[setting] += 1
    return blocks
