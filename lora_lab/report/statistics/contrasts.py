"""One factor changed, all else equal: paired log ratios, averaged over the settings of everything else (the cells)."""

from collections.abc import Sequence
from dataclasses import dataclass

from lora_lab.report.measures import GPU_WORK, THROUGHPUT, Measure
from lora_lab.report.statistics.averages import average
from lora_lab.report.statistics.blocks import TrialFigure, figures
from lora_lab.report.statistics.estimates import Estimate
from lora_lab.report.statistics.factors import Factor
from lora_lab.report.statistics.pairs import PairedSetting, paired_settings
from lora_lab.report.statistics.step_split import StepSplit, step_split
from lora_lab.store.trials import Trial

_REGIMES = ("host-bound", "host-bound to GPU-bound", "mixed", "GPU-bound to host-bound", "GPU-bound", "not known")

_READ_BACK = ("ran.attention", "ran.attention_kernel", "ran.gradient_checkpointing", "stand_ins")
"""Facts of how a trial ran, as read back, that only a setting of the same name should change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """The change of a measure when one factor went from `over` to `of` and nothing else changed.

    The value is the average over the cells of this grid, each counting the same. Its intervals do not cover settings
    outside the grid, nor other machines."""

    measure: Measure
    factor: str
    of: str
    over: str
    regime: str
    """The regime of the cells it is made of: host-bound, GPU-bound, from one to the other, mixed, not known."""
    estimate: Estimate
    """of - over, on the log scale for ratios. Its interval is that of `sessions_like_it` where there is one, else that
    of `this_session`: it decides whether a difference is seen."""
    this_session: Estimate
    """The same value with the interval over repeats: for the session that was run."""
    sessions_like_it: Estimate | None
    """The same value with the interval that holds for other sessions on this machine, too: at least as wide. None where
    a sweep has fewer than three blocks."""
    pairs: int
    cells: int
    """Settings of everything else in which pairs were found."""
    also_changed: tuple[str, ...]
    """What also ran differently, as read back: "attention kernel: cudnn, math" (`over`'s first)."""
    interval_over: str = "nothing"
    """What the estimate's interval counts as noise: "repeats"; or "settings", where some cells have one pair only: then
    it also holds how the effect differs from cell to cell, and is an interval for settings like these; or "blocks"; or
    "nothing": no interval."""
    split: StepSplit | str = ""
    """The change of the step's time in GPU work and idle time, for throughput and GPU work; text says why not."""
    lowest: float | None = None
    """The smallest of the cells' means, on the estimate's scale; noise alone spreads them too."""
    highest: float | None = None


def contrasts(trials: Sequence[Trial], factors: Sequence[Factor], measure: Measure) -> list[Contrast]:
    """Compare every level of every factor with its baseline, by regime.

    A cell's regime is that of its paired trials' mean, or that of the baseline's to that of the level's.
    Levels that no block holds together with the baseline, all else equal, have no contrast.

    Args:
        trials: measured ones of one place; those without the figure are left out.
    """
    found = figures(trials, measure)
    return [contrast for factor in factors for contrast in _of_factor(found, factor, measure)]


def _of_factor(found: Sequence[TrialFigure], factor: Factor, measure: Measure) -> list[Contrast]:
    made = []
    for level in factor.levels[1:]:
        by_regime: dict[str, list[PairedSetting]] = {}
        for setting in paired_settings(found, factor, level):
            by_regime.setdefault(setting.regime, []).append(setting)
        regimes = sorted(by_regime, key=lambda regime: (_REGIMES.index(regime) if regime in _REGIMES else 99, regime))
        made += [contrast_of(by_regime[regime], factor, level, measure, regime) for regime in regimes]
    return made


def contrast_of(
    settings: Sequence[PairedSetting], factor: Factor, level: str, measure: Measure, regime: str
) -> Contrast:
    """Average the settings' differences; all are of this regime."""
    found = average([setting.difference for setting in settings])
    values = [setting.difference.value for setting in settings]
    return Contrast(
        measure=measure,
        factor=factor.name,
        of=level,
        over=factor.levels[0],
        regime=regime,
        estimate=found.estimate,
        this_session=found.this_session,
        sessions_like_it=found.sessions_like_it,
        pairs=sum(len(setting.pairs) for setting in settings),
        cells=len(settings),
        also_changed=_also_changed(settings, factor),
        interval_over=found.interval_over,
        split=step_split(settings) if measure in (THROUGHPUT, GPU_WORK) else "",
        lowest=min(values),
        highest=max(values),
    )


def _also_changed(settings: Sequence[PairedSetting], factor: Factor) -> tuple[str, ...]:
    changed: dict[str, None] = {}
    for fact in _READ_BACK:
        name = fact.removeprefix("ran.").replace("_", " ")
        if any(name.startswith(key.replace("_", " ")) for key in factor.keys):
            continue
        for pair in (pair for setting in settings for pair in setting.pairs):
            over, of = ([trial.tags.get(fact, "not recorded") for trial in side] for side in pair)
            if set(over) != set(of):
                changed[f"{name.replace('stand ins', 'stand-ins')}: {over[0]}, {of[0]}"] = None
    return tuple(changed)
