"""Judge a sweep with repeats=auto: a pure function of its rule and of the trials so far.

The figures are looked at after numbers of pairs that the rule fixes (Rule.looks). At each look, a contrast is

- equivalent if two one-sided t tests at the look's level place the change within the margin (Schuirmann 1987);
- else faster or slower if the two-sided t test at that level finds a change.

A contrast keeps the answer of the first look that gives one. In a family of several contrasts, each kind of test is
Holm's (1979, A Simple Sequentially Rejective Multiple Test Procedure) at each look.

The difference of a pair is that of the logarithms. Where a block holds several pairs of a contrast, at other settings
of the rest, their mean counts as the block's one pair. If the mean of one of these settings lies beyond the margin, the
contrast is equivalent on average only.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from scipy.special import stdtr, stdtrit

from lora_lab.comparison.rule import GPU_BUSY_SHARE, TOKENS_PER_SECOND, Contrast, Rule
from lora_lab.outcome import Outcome

_IN_A_ROW = 2
"""A point whose figures did not count this many times in a row is not tried again."""

_MOST_PAIRS = 10**9


class Answer(Enum):
    """What is known of a contrast."""

    faster = "faster"
    slower = "slower"
    equivalent = "equivalent"
    mixed = "equivalent on average only"
    """The average is, but the mean of one of the other settings lies beyond the margin."""
    unsettled = "not settled"
    incomparable = "cannot be compared"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A trial that is over."""

    block: int
    point: str
    """Digest of its config."""
    name: str = ""
    """Its point's name, for the user."""
    outcome: str
    reason: str
    tags: Mapping[str, str]
    metrics: Mapping[str, float]

    def why_not(self, measure: str) -> str:
        """Return why its figure of the measure does not count; empty if it does."""
        if self.outcome != Outcome.finished.value:
            return f"{self.outcome.replace('_', ' ')}: {self.reason}".strip(": .")
        if self.tags.get("validity") == "invalid":
            return f"invalid: {self.tags.get('validity_reasons', 'no reason kept')}"
        if measure not in self.metrics:
            return self.tags.get(f"absent.{measure}", "no tokens/s recorded")
        value = self.metrics[measure]
        return "" if 0 < value < math.inf else f"{value:g} tokens/s"

    @property
    def stand_ins(self) -> frozenset[str] | None:
        """Return what ran instead of what was asked for; None where that was not recorded."""
        known = self.tags.get("stand_ins")
        return None if known is None else frozenset(known.split("; ")) - {"none"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean difference of logarithms with its Student interval."""

    value: float
    low: float
    high: float
    confidence: float
    """0.95, or 0.9 where two one-sided tests of 0.05 each decided. The interval is wider than Student's of one look, so
    that the statement holds over all looks and at least for each contrast."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the pairs say of one contrast."""

    contrast: Contrast
    answer: Answer
    pairs: int
    """How many pairs the answer comes from."""
    change: Interval | None = None
    """Of the measure; None with fewer than two pairs."""
    by_setting: tuple[float, ...] = ()
    """The same mean for each of the other settings, where there are several."""
    gpu: Interval | None = None
    """Of the time that the GPU itself works for a token, over the same pairs; None where it was not measured."""
    more_pairs: int = 0
    """About how many are missing, if mean and spread stay as they are."""
    why: str = ""
    """Why it cannot be compared."""
    uncounted: int = 0
    """How many pairs were begun and do not count, until the answer."""
    why_uncounted: str = ""
    """Why the latest of these does not."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """The pairs of one contrast up to a look."""

    pairs: int
    mean: float
    error: float
    """Standard error of the mean."""

    def p_change(self) -> float:
        """Return the two-sided p-value of no change."""
        return min(1.0, 2 * self._tail(abs(self.mean)))

    def p_beyond(self, margin: float) -> float:
        """Return the larger p-value of the two one-sided tests of a change beyond the margin."""
        return self._tail(margin - abs(self.mean))

    def interval(self, tail: float, confidence: float) -> Interval:
        """Return the interval that leaves out `tail` on each side."""
        reach = float(stdtrit(self.pairs - 1, 1 - tail)) * self.error
        return Interval(value=self.mean, low=self.mean - reach, high=self.mean + reach, confidence=confidence)

    def _tail(self, distance: float) -> float:
        if self.error == 0.0:  # the figures are equal to the last digit
            return 0.0 if distance > 0 else 1.0
        return float(stdtr(self.pairs - 1, -distance / self.error))


def _sample(differences: Sequence[float]) -> _Sample:
    """Summarise two differences or more."""
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return _Sample(len(differences), statistics.fmean(differences), error)


def judge(rule: Rule, runs: Iterable[Run]) -> tuple[Verdict, ...]:
    """Return a verdict for each contrast of the rule, from the trials that are over, in any order."""
    blocks: dict[int, dict[str, Run]] = {}
    for run in sorted(runs, key=lambda run: run.block):
        blocks.setdefault(run.block, {})[run.point] = run
    there = list(blocks.values())
    counted = [
        [] if _stand_in(contrast, there) else [block for block in there if _holds(block, contrast, rule)]
        for contrast in rule.contrasts
    ]
    found = [
        [_difference(block, contrast, lambda run: run.metrics[rule.measure]) for block in whole]
        for contrast, whole in zip(rule.contrasts, counted, strict=True)
    ]
    settled = _settled(rule, found)
    verdicts = [
        settled.get(place) or _open(rule, contrast, found[place], there)
        for place, contrast in enumerate(rule.contrasts)
    ]
    return tuple(
        _with_uncounted(_with_gpu(_with_settings(verdict, whole, rule), whole), whole, there, rule)
        for verdict, whole in zip(verdicts, counted, strict=True)
    )


def _holds(block: Mapping[str, Run], contrast: Contrast, rule: Rule) -> bool:
    """Return whether the block has a whole pair of the contrast: each of its points, measured."""
    runs = [block.get(point) for point in contrast.points]
    return all(run is not None and not run.why_not(rule.measure) for run in runs)


def _difference(block: Mapping[str, Run], contrast: Contrast, figure: Callable[[Run], float]) -> float:
    """Return the mean difference of a figure's logarithms over the block's pairs of points."""
    pairs = zip(contrast.over_points, contrast.of_points, strict=True)
    return statistics.fmean(math.log(figure(block[of]) / figure(block[over])) for over, of in pairs)


def _gpu_work(run: Run) -> float:
    """Return the seconds that the GPU itself worked for a token, its busy share / tokens per second, as the report has
    them; 0 where that was not measured."""
    return run.metrics.get(GPU_BUSY_SHARE, 0.0) / run.metrics[TOKENS_PER_SECOND]


def _settled(rule: Rule, found: Sequence[Sequence[float]]) -> dict[int, Verdict]:
    """Return the verdicts of the contrasts that a look has settled, by their place in the family."""
    settled: dict[int, Verdict] = {}
    for pairs, level in rule.looks():
        there = {place: _sample(all_[:pairs]) for place, all_ in enumerate(found) if len(all_) >= pairs}
        if not there:
            return settled
        size = len(rule.contrasts)
        beyond = _holm({place: sample.p_beyond(rule.margin) for place, sample in there.items()}, size, level)
        change = _holm({place: sample.p_change() for place, sample in there.items()}, size, level)
        for place, sample in there.items():
            answer, interval = _answer(sample, rule.margin, beyond[place], change[place])
            if place not in settled and answer is not Answer.unsettled:
                contrast = rule.contrasts[place]
                settled[place] = Verdict(contrast=contrast, answer=answer, pairs=pairs, change=interval)
    raise AssertionError("looks never end")


def _answer(sample: _Sample, margin: float, beyond: float, change: float) -> tuple[Answer, Interval]:
    """Return the answer of one look.

    Args:
        beyond, change: levels of the tests of equivalence and of a change.
    """
    if sample.p_beyond(margin) <= beyond:
        return Answer.equivalent, sample.interval(beyond, 0.9)
    interval = sample.interval(change / 2, 0.95)
    if sample.p_change() <= change:
        return Answer.faster if sample.mean > 0 else Answer.slower, interval
    return Answer.unsettled, interval


def _holm(p: Mapping[int, float], size: int, level: float) -> dict[int, float]:
    """Return the level at which Holm tests each hypothesis in a family of `size`; those without a p-value yet are
    tested last."""
    levels: dict[int, float] = {}
    tested, rejecting = level, True
    for rejected, place in enumerate(sorted(p, key=lambda place: p[place])):
        if rejecting:
            tested = level / (size - rejected)
        levels[place] = tested
        rejecting = rejecting and p[place] <= tested
    return levels


def _open(rule: Rule, contrast: Contrast, differences: Sequence[float], blocks: Sequence[Mapping[str, Run]]) -> Verdict:
    """Return the verdict on a contrast that no look has settled."""
    why = _stand_in(contrast, blocks) or _failure(rule, contrast, blocks)
    if why:
        return Verdict(contrast=contrast, answer=Answer.incomparable, pairs=len(differences), why=why)
    if len(differences) < 2:
        more = rule.first_pairs - len(differences)
        return Verdict(contrast=contrast, answer=Answer.unsettled, pairs=len(differences), more_pairs=more)
    sample, family = _sample(differences), len(rule.contrasts)
    level = next(level for pairs, level in rule.looks() if pairs > len(differences))
    return Verdict(
        contrast=contrast,
        answer=Answer.unsettled,
        pairs=len(differences),
        change=sample.interval(level / family / 2, 0.95),
        more_pairs=_missing(rule, sample),
    )


def _missing(rule: Rule, sample: _Sample) -> int:
    """Return how many more pairs it takes to the look that settles it, if mean and spread stay as they are."""
    there, family = sample.pairs, len(rule.contrasts)
    spread = sample.error * math.sqrt(there)
    for pairs, level in rule.looks():
        if pairs <= there:
            continue
        error, level = spread / math.sqrt(pairs), level / family
        within = abs(sample.mean) + float(stdtrit(pairs - 1, 1 - level)) * error <= rule.margin
        if within or abs(sample.mean) > float(stdtrit(pairs - 1, 1 - level / 2)) * error or pairs > _MOST_PAIRS:
            return pairs - there
    raise AssertionError("looks never end")


def _stand_in(contrast: Contrast, blocks: Sequence[Mapping[str, Run]]) -> str:
    """Say which level did not run as asked where the other did, or had another stand-in; empty where none is known."""
    for over_point, of_point in zip(contrast.over_points, contrast.of_points, strict=True):
        for block in blocks:
            over, of = (block[point].stand_ins if point in block else None for point in (over_point, of_point))
            if over is not None and of is not None and over != of:
                level, only = (contrast.of, of - over) if of - over else (contrast.over, over - of)
                return f"{level} did not run as asked here ({'; '.join(sorted(only))})"
    return ""


def _failure(rule: Rule, contrast: Contrast, blocks: Sequence[Mapping[str, Run]]) -> str:
    """Say which level has a point whose latest figures in a row do not count; empty where none has.

    A killed trial shows nothing of its point, so it is passed over."""
    for level, points in ((contrast.over, contrast.over_points), (contrast.of, contrast.of_points)):
        for point in points:
            ran = [block[point] for block in blocks if point in block and block[point].outcome != Outcome.killed.value]
            why = [run.why_not(rule.measure) for run in ran[-_IN_A_ROW:]]
            if len(why) == _IN_A_ROW and all(why):
                failed = "failed" if ran[-1].outcome != Outcome.finished.value else "gave no figure that counts"
                if len(points) == 1:
                    return f"{level} {failed} {_IN_A_ROW} times in a row ({why[-1]})"
                return (
                    f"{level} {failed} {_IN_A_ROW} times in a row at one of the other settings, {ran[-1].name} "
                    f"({why[-1]}); to compare in the others, leave that value out of the sweep"
                )
    return ""


def _with_settings(verdict: Verdict, blocks: Sequence[Mapping[str, Run]], rule: Rule) -> Verdict:
    """Add the means by the other settings. What is equivalent on average is not equivalent if one of them is beyond the
    margin."""
    contrast, used = verdict.contrast, blocks[: verdict.pairs]
    if len(contrast.of_points) < 2 or not used:
        return verdict
    means = tuple(
        statistics.fmean(
            math.log(block[of].metrics[rule.measure] / block[over].metrics[rule.measure]) for block in used
        )
        for over, of in zip(contrast.over_points, contrast.of_points, strict=True)
    )
    beyond = verdict.answer is Answer.equivalent and any(abs(mean) > rule.margin for mean in means)
    return replace(verdict, answer=Answer.mixed if beyond else verdict.answer, by_setting=means)


def _with_gpu(verdict: Verdict, blocks: Sequence[Mapping[str, Run]]) -> Verdict:
    """Add the change of the GPU's own work, with Student's interval over the verdict's pairs."""
    contrast = verdict.contrast
    used = [
        block
        for block in blocks[: verdict.pairs]
        if all(0 < _gpu_work(block[point]) < math.inf for point in contrast.points)
    ]
    if len(used) < 2:
        return verdict
    gpu = _sample([_difference(block, contrast, _gpu_work) for block in used]).interval(0.025, 0.95)
    return replace(verdict, gpu=gpu)


def _with_uncounted(
    verdict: Verdict, whole: Sequence[Mapping[str, Run]], blocks: Sequence[Mapping[str, Run]], rule: Rule
) -> Verdict:
    """Add how many pairs do not count. Those after the last pair of an answer do not matter to it.

    Args:
        whole: the blocks whose pairs count.
    """
    contrast, latest = verdict.contrast, blocks
    if verdict.answer not in (Answer.unsettled, Answer.incomparable):
        latest = blocks[: blocks.index(whole[verdict.pairs - 1])]
    begun = [[block[point] for point in contrast.points if point in block] for block in latest]
    lost = [runs for runs, block in zip(begun, latest, strict=True) if runs and not _holds(block, contrast, rule)]
    if not lost:
        return verdict
    why = next((why for run in lost[-1] if (why := run.why_not(rule.measure))), "a kill cut it off")
    return replace(verdict, uncounted=len(lost), why_uncounted=why)
