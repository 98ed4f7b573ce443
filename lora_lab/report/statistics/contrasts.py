"""One factor changed, all else equal: paired log ratios, with intervals over repeats.

A pair is two trials of one block (the same repeat of the same sweep) whose settings differ in the factor and in
nothing else, so what slows a whole block cancels out of their difference. A cell is one setting of everything else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lora_lab.report.measures import Measure
from lora_lab.report.statistics.averages import average
from lora_lab.report.statistics.blocks import Block, TrialFigure, figures, regime_between, settings_besides
from lora_lab.report.statistics.differences import Difference, by_block, paired
from lora_lab.report.statistics.estimates import Estimate
from lora_lab.report.statistics.factors import Factor
from lora_lab.store.trials import Trial

_REGIMES = ("host-bound", "host-bound to GPU-bound", "mixed", "GPU-bound to host-bound", "GPU-bound", "not known")

_READ_BACK = ("ran.attention", "ran.attention_kernel", "ran.gradient_checkpointing", "stand_ins")
"""Facts of how a trial ran, as read back, that only a setting of the same name should change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """The change of a measure when one factor went from `over` to `of` and nothing else changed.

    The estimate is the average over the cells of this grid, each counting the same. Its interval says how far that
    average would move if the same grid were run again; it does not cover settings outside the grid."""

    measure: Measure
    factor: str
    of: str
    over: str
    regime: str
    """The regime of the trials it is made of: host-bound, GPU-bound, from one to the other, mixed, not known."""
    estimate: Estimate
    """of - over, on the log scale for ratios."""
    pairs: int
    cells: int
    """Settings of everything else in which pairs were found."""
    also_changed: tuple[str, ...]
    """What also ran differently, as read back: "attention kernel: cudnn, math" (`over`'s first)."""
    interval_over: str = "nothing"
    """What the interval counts as noise: "repeats"; or "settings", where some cells have one pair only: then it also
    holds how the effect differs from cell to cell, and is an interval for settings like these; or "blocks", where the
    difference itself was another in other blocks (F test, p < 0.05); or "nothing": no interval."""
    by_blocks: Estimate | None = None
    """The same value with the interval over blocks' mean differences, as a check: the estimate's own takes what a block
    does to the difference for noise of single pairs. None with one cell, where the two are the same, or where a sweep
    has fewer than three blocks."""
    lowest: float | None = None
    """The smallest of the cells' means, on the estimate's scale; noise alone spreads them too."""
    highest: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedSetting:
    """One setting of everything else: the trials of the blocks that hold both levels of the factor."""

    pairs: tuple[tuple[tuple[Trial, ...], tuple[Trial, ...]], ...]
    """By block, `over`'s trials and `of`'s: one each, but for a point that a block holds twice."""
    regime: str
    difference: Difference
    """`of` minus `over`."""

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Return `over`'s trials, then `of`'s."""
        return tuple(trial for side in (0, 1) for pair in self.pairs for trial in pair[side])


def contrasts(trials: Sequence[Trial], factors: Sequence[Factor], measure: Measure) -> list[Contrast]:
    """Compare every level of every factor with its baseline, by regime.

    A cell's regime is the one that all its paired trials ran in, or that of the baseline's to that of the level's, else
    "mixed". Levels that no block holds together with the baseline, all else equal, have no contrast.

    Args:
        trials: measured ones of one place; those without the figure are left out.
    """
    found = figures(trials, measure)
    return [contrast for factor in factors for contrast in _of_factor(found, factor, measure)]


def paired_settings(found: Sequence[TrialFigure], factor: Factor, level: str) -> list[PairedSetting]:
    """Return the settings of everything else in which a block holds both the level and the factor's first."""
    settings = settings_besides([figure.trial for figure in found], [factor])
    sides: dict[tuple[str, ...], dict[str, list[TrialFigure]]] = {}
    for figure, setting in zip(found, settings, strict=True):
        sides.setdefault(setting, {}).setdefault(factor.level(figure.trial), []).append(figure)
    made = (_paired(each.get(factor.levels[0], ()), each.get(level, ())) for _, each in sorted(sides.items()))
    return [each for each in made if each is not None]


def _paired(over: Sequence[TrialFigure], of: Sequence[TrialFigure]) -> PairedSetting | None:
    apart = paired(by_block(of), by_block(over))
    if apart is None:
        return None
    [blocks] = apart.samples
    pairs = tuple((_trials(over, block), _trials(of, block)) for block in blocks)
    before, after = ([trial for pair in pairs for trial in pair[side]] for side in (0, 1))
    return PairedSetting(pairs=pairs, regime=regime_between(before, after), difference=apart)


def _trials(figures: Sequence[TrialFigure], block: Block) -> tuple[Trial, ...]:
    return tuple(figure.trial for figure in figures if figure.block == block)


def _of_factor(found: Sequence[TrialFigure], factor: Factor, measure: Measure) -> list[Contrast]:
    made = []
    for level in factor.levels[1:]:
        by_regime: dict[str, list[PairedSetting]] = {}
        for setting in paired_settings(found, factor, level):
            by_regime.setdefault(setting.regime, []).append(setting)
        regimes = sorted(by_regime, key=lambda regime: (_REGIMES.index(regime) if regime in _REGIMES else 99, regime))
        made += [_contrast(by_regime[regime], factor, level, measure, regime) for regime in regimes]
    return made


def _contrast(settings: Sequence[PairedSetting], factor: Factor, level: str, measure: Measure, regime: str) -> Contrast:
    found = average([setting.difference for setting in settings])
    values = [setting.difference.value for setting in settings]
    return Contrast(
        measure=measure,
        factor=factor.name,
        of=level,
        over=factor.levels[0],
        regime=regime,
        estimate=found.estimate,
        pairs=sum(len(setting.pairs) for setting in settings),
        cells=len(settings),
        also_changed=_also_changed(settings, factor),
        interval_over=found.interval_over,
        by_blocks=found.by_blocks,
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
