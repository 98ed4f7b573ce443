"""One factor changed, all else equal: paired log ratios, with intervals over repeats.

A pair is two trials of one block (the same repeat of the same sweep) whose settings differ in the factor and in
nothing else, so what slows a whole block falls out of their difference. A cell is one setting of everything else.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_lab.report.measures import Measure
from lora_lab.report.statistics.averages import average
from lora_lab.report.statistics.blocks import Block, Figure, figures, regime_between, settings_besides
from lora_lab.report.statistics.estimates import Estimate
from lora_lab.report.statistics.factors import Factor
from lora_lab.store.trials import Trial

_REGIMES = ("host-bound", "host-bound to GPU-bound", "mixed", "GPU-bound to host-bound", "GPU-bound", "not known")

_READ_BACK = ("ran.attention", "ran.attention_kernel", "ran.gradient_checkpointing", "stand_ins")
"""What a trial read back of how it ran, and what only a setting of the same name ought to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """What a measure did when one factor went from `over` to `of` and nothing else changed.

    The estimate is the average over the cells of this grid, each counting the same. Its interval says how far that
    average would move if the same grid were run again; it says nothing of settings outside the grid."""

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
    """What ran differently besides, as read back: "attention kernel: cudnn, math" (`over`'s first)."""
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
class _Pair:
    block: Block
    of: Sequence[Figure]
    """One trial, but for a point that a block holds twice: then the mean of its figures counts."""
    over: Sequence[Figure]

    @property
    def difference(self) -> float:
        return statistics.fmean(figure.value for figure in self.of) - statistics.fmean(
            figure.value for figure in self.over
        )


def contrasts(trials: Sequence[Trial], factors: Sequence[Factor], measure: Measure) -> list[Contrast]:
    """Every level of every factor against its baseline, by regime.

    A cell's regime is the one that all its paired trials ran in, or that of the baseline's to that of the level's, else
    "mixed". Levels that no block holds together
    with the baseline, all else equal, have no contrast.

    Args:
        trials: measured ones of one place; those without the figure are left out.
    """
    found = figures(trials, measure)
    return [contrast for factor in factors for contrast in _of_factor(found, factor, measure)]


def _of_factor(found: Sequence[Figure], factor: Factor, measure: Measure) -> list[Contrast]:
    settings = settings_besides([figure.trial for figure in found], [factor])
    cells: dict[tuple[str, ...], dict[str, dict[Block, list[Figure]]]] = {}
    for figure, setting in zip(found, settings, strict=True):
        level = factor.level(figure.trial)
        cells.setdefault(setting, {}).setdefault(level, {}).setdefault(figure.block, []).append(figure)
    made = []
    for level in factor.levels[1:]:
        by_regime: dict[str, list[list[_Pair]]] = {}
        for _, sides in sorted(cells.items()):
            pairs = _pairs(sides.get(level, {}), sides.get(factor.levels[0], {}))
            if pairs:
                over = [figure.trial for pair in pairs for figure in pair.over]
                of = [figure.trial for pair in pairs for figure in pair.of]
                by_regime.setdefault(regime_between(over, of), []).append(pairs)
        told = sorted(by_regime, key=lambda regime: (_REGIMES.index(regime) if regime in _REGIMES else 99, regime))
        made += [_contrast(by_regime[regime], factor, level, measure, regime) for regime in told]
    return made


def _pairs(of: Mapping[Block, list[Figure]], over: Mapping[Block, list[Figure]]) -> list[_Pair]:
    return [_Pair(block=block, of=of[block], over=over[block]) for block in sorted(of.keys() & over.keys())]


def _contrast(cells: Sequence[Sequence[_Pair]], factor: Factor, level: str, measure: Measure, regime: str) -> Contrast:
    differences = [{pair.block: pair.difference for pair in pairs} for pairs in cells]
    means = [statistics.fmean(cell.values()) for cell in differences]
    found = average(differences)
    pairs = [pair for cell in cells for pair in cell]
    return Contrast(
        measure=measure,
        factor=factor.name,
        of=level,
        over=factor.levels[0],
        regime=regime,
        estimate=found.estimate,
        pairs=len(pairs),
        cells=len(cells),
        also_changed=_also_changed(pairs, factor),
        interval_over=found.interval_over,
        by_blocks=found.by_blocks,
        lowest=min(means),
        highest=max(means),
    )


def _also_changed(pairs: Sequence[_Pair], factor: Factor) -> tuple[str, ...]:
    changed: dict[str, None] = {}
    for fact in _READ_BACK:
        name = fact.removeprefix("ran.").replace("_", " ")
        if any(name.startswith(key.replace("_", " ")) for key in factor.keys):
            continue
        for pair in pairs:
            over, of = ([_fact(figure.trial, fact) for figure in side] for side in (pair.over, pair.of))
            if set(over) != set(of):
                changed[f"{name.replace('stand ins', 'stand-ins')}: {over[0]}, {of[0]}"] = None
    return tuple(changed)


def _fact(trial: Trial, fact: str) -> str:
    return trial.tags.get(fact, "not recorded")
