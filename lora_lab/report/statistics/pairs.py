"""Pairs of trials that differ in one factor alone, by the setting of everything else.

A pair is two trials of one block (the same repeat of the same sweep), so what slows a whole block cancels out of their
difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lora_lab.report.statistics.blocks import Block, TrialFigure, regime_between, settings_besides
from lora_lab.report.statistics.differences import Difference, by_block, paired
from lora_lab.report.statistics.factors import Factor
from lora_lab.store.trials import Trial


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
