"""What a change of one factor did, in sentences and in rows of a small table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_lab.report.findings import GroupFindings
from lora_lab.report.measures import MEASURES, THROUGHPUT, VRAM, Better, Measure
from lora_lab.report.statistics.contrasts import Contrast
from lora_lab.report.statistics.estimates import percent
from lora_lab.report.statistics.factorial import Effect as ModelEffect
from lora_lab.report.statistics.factors import SHAPE
from lora_lab.report.statistics.step_split import StepSplit
from lora_lab.report.writing.labels import count, level_text
from lora_lab.report.writing.numbers import LESS_NOISE, change, detectable_text, interval, is_absurd

_LARGE = math.log(1.25)
"""A smallest difference that would have shown is not worth a number beyond this log ratio."""
_TWICE = math.log(2)
"""From this log ratio on, "2.1 times as fast" is easier to read than percent."""

_CLEAR = ("host-bound", "GPU-bound", "not known")
"""Regimes of trials that did not go from one to the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """A change from one level of a factor to another, by what the trials waited for."""

    over: str
    of: str
    is_shape: bool
    is_judged: bool
    """Whether repeats=auto answers it."""
    contrasts: tuple[Contrast, ...]
    """Of throughput, by regime."""

    @property
    def main(self) -> Contrast:
        """Return the contrast of its largest difference that was seen; else the first."""
        return max(self.contrasts, key=lambda each: abs(each.estimate.value) if each.estimate.seen else 0.0)

    @property
    def largest(self) -> float:
        """Return the size of its largest difference that was seen, as a log ratio; 0 without one."""
        return max((abs(each.estimate.value) for each in self.contrasts if each.estimate.seen), default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the small table."""

    measure: str
    change: str
    """What changed, and in which trials."""
    result: str
    interval: str


def real_contrasts(found: GroupFindings) -> tuple[Contrast, ...]:
    """Return the contrasts in which both sides ran what was asked for, not a stand-in."""
    return tuple(each for each in found.contrasts if not _stand_ins(each))


def real(found: GroupFindings, effects: Sequence[ModelEffect]) -> list[ModelEffect]:
    """Return a model's effects without those between levels of which one ran as a stand-in."""
    gone = {(each.factor, each.of, each.over) for each in found.contrasts if _stand_ins(each)}
    return [effect for effect in effects if (effect.factor, effect.of, effect.over) not in gone]


def dropped(found: GroupFindings) -> str:
    """Return why contrasts of stand-ins are not shown; "" if there are none."""
    gone = {_names(found, each): _stand_ins(each) for each in found.contrasts if _stand_ins(each)}
    if not gone:
        return ""
    told = ", ".join(f"{of} with {over}" for over, of in gone)
    why = next(iter(gone.values())).partition(": ")[2].removeprefix("none, ")
    return f"Not compared: {told}. One of them did not run as asked here: {why}."


def effects(found: GroupFindings) -> list[Effect]:
    """Return each factor's largest effect on the throughput, the largest first, and that of the shape last.

    In host-bound trials, twice the tokens in a step are nearly twice the tokens per second whatever the card: of all
    factors the shape says least."""
    by_levels: dict[tuple[str, str, str], list[Contrast]] = {}
    for each in real_contrasts(found):
        if each.measure is THROUGHPUT:
            by_levels.setdefault((each.factor, each.of, each.over), []).append(each)
    by_factor: dict[str, list[Effect]] = {}
    for those in by_levels.values():
        over, of = _names(found, those[0])
        clear = [each for each in those if each.regime in _CLEAR] or those
        effect = Effect(
            over=over,
            of=of,
            is_shape=_is_shape(found, those[0]),
            is_judged=(those[0].factor, those[0].of, those[0].over) in found.judged,
            contrasts=tuple(clear),
        )
        by_factor.setdefault(those[0].factor, []).append(effect)
    made = [max(those, key=lambda effect: effect.largest) for those in by_factor.values()]
    return sorted(made, key=lambda effect: (effect.is_shape, -effect.largest))


def is_mostly_idle(effect: Effect) -> bool:
    """Return whether what was seen to change in a step, or what repeats=auto answers, is mostly idle time."""
    split = effect.main.split
    if not isinstance(split, StepSplit) or not (effect.is_judged or effect.main.estimate.seen):
        return False
    return abs(split.idle.value) > abs(split.gpu.value)


def sentence(effect: Effect, repeats: int) -> str:
    """Return one sentence about what a change did to the speed.

    Args:
        repeats: how often a point ran at most."""
    first, *rest = effect.contrasts
    if not rest:
        return f"{_said(effect, first, repeats)}."
    second = rest[0]
    seen = [each for each in (first, second) if each.estimate.seen and not is_absurd(each.estimate, each.measure)]
    unseen = [each for each in (first, second) if each.estimate.seen is False]
    if len(seen) == 2:
        return f"{_than(effect, first)} in {first.regime} trials and {_size(second)} in {second.regime} ones."
    if len(unseen) == 2 and not any(is_absurd(each.estimate, each.measure) for each in unseen):
        both = f"in {first.regime} or {second.regime} trials"
        return f"no difference in speed was seen between {effect.of} and {effect.over} {both}."
    if seen:
        other = second if seen[0] is first else first
        rest_said = "no difference was seen" if other in unseen else "the figures are too noisy to say"
        return f"{_than(effect, seen[0])} in {seen[0].regime} trials; in {other.regime} ones {rest_said}."
    return f"{_said(effect, first, repeats)} in {first.regime} trials."


def _said(effect: Effect, each: Contrast, repeats: int) -> str:
    found = each.estimate
    if is_absurd(found, each.measure):
        with_repeats = f"with {count(repeats, 'repeat')}"
        return f"{effect.of} and {effect.over} are too noisy to compare {with_repeats}; {LESS_NOISE}"
    if found.seen is None:
        return f"{_than(effect, each)} in single trials, which may be chance"
    if not found.seen:
        would = _would(found.detectable, each.measure)
        return f"no difference in speed was seen between {effect.of} and {effect.over}{would}"
    return _than(effect, each)


def _would(detectable: float | None, measure: Measure) -> str:
    if not detectable:
        return ""
    if detectable > _LARGE:
        return "; only a large one would have shown"
    return f"; one of {detectable_text(detectable, measure)} would have shown"


def _than(effect: Effect, each: Contrast) -> str:
    word = "as" if each.estimate.value >= _TWICE else "than"
    return f"{effect.of} was {_size(each)} {word} {effect.over}"


def _size(each: Contrast) -> str:
    value = each.estimate.value
    if value >= _TWICE:
        return f"{math.exp(value):.2g} times as fast"
    return f"{abs(percent(value)):.1f} % {'faster' if value > 0 else 'slower'}"


def rows(found: GroupFindings, most: int) -> list[Row]:
    """Return the small table: the largest effects, each with what it did to every measure.

    Not what repeats=auto answers: that has its own interval."""
    all_ = effects(found)
    kept = {(each.factor, each.of, each.over, each.regime) for effect in all_ for each in effect.contrasts}
    order = [each for effect in all_ if not effect.is_judged for each in effect.contrasts]
    others = [each for measure in MEASURES for each in real_contrasts(found) if each.measure is measure]
    order += [
        each
        for each in others
        if each.measure is not THROUGHPUT and (each.factor, each.of, each.over, each.regime) in kept
    ]
    return [_row(found, each) for each in order[:most]]


def _row(found: GroupFindings, each: Contrast) -> Row:
    over, of = _names(found, each)
    where = "" if each.regime == "not known" or each.measure is VRAM else f", {each.regime}"
    estimate, measure = each.estimate, each.measure
    ends = interval(estimate, measure)
    if is_absurd(estimate, measure):
        result, ends = "too noisy", LESS_NOISE
    elif estimate.low == estimate.high and estimate.low is not None:
        result, ends = (change(estimate.value, measure) if estimate.value else "the same"), "the same in every repeat"
    elif estimate.seen is False:
        result = "no difference seen"
    else:
        result = change(estimate.value, measure)
    better = "" if not estimate.seen else _better(estimate.value, measure)
    return Row(
        measure=measure.title,
        change=f"{of} instead of {over}{where}",
        result=f"{result}{better}",
        interval=ends or "not repeated",
    )


def _better(value: float, measure: Measure) -> str:
    good = (value > 0) == (measure.better is Better.higher)
    return " better" if good else " worse"


def _stand_ins(each: Contrast) -> str:
    return next((text for text in each.also_changed if text.startswith("stand-ins")), "")


def _is_shape(found: GroupFindings, each: Contrast) -> bool:
    return any(factor.name == each.factor and set(factor.keys) <= set(SHAPE) for factor in found.compared)


def _names(found: GroupFindings, each: Contrast) -> tuple[str, str]:
    """Return both levels in words, the baseline's first."""
    factor = next(factor for factor in found.compared if factor.name == each.factor)
    together = " together" if len(factor.keys) > 1 and not _is_shape(found, each) else ""
    return level_text(factor, each.over), level_text(factor, each.of) + together
