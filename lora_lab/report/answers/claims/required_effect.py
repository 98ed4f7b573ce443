"""The effect that one factor would need for a study's printed ratio.

The study compares two runs between which several factors changed. This machine's split of the same two points says how
much of the log ratio the other factors make here; what is then missing from the study's ratio is what the claim's
factor would need to contribute, if the other factors have the same effects there as here."""

import math
from dataclasses import dataclass, replace

from lora_lab.report.answers.claims.study import Claim, ContrastClaim, Study
from lora_lab.report.measures import THROUGHPUT
from lora_lab.report.statistics.attribution import Split
from lora_lab.report.statistics.estimates import Estimate
from lora_lab.report.statistics.factors import tokens_a_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Needed:
    """The effect that a claim's factor would need."""

    claim: str
    """Its id."""
    factor: str
    regime: str
    """Of this machine's trials; "mixed" where they disagree."""
    paper_ratio: float
    """The study's own ratio between its two runs."""
    estimate: Estimate
    """The effect needed in addition to this machine's other parts, as a log ratio."""
    step_ms: float
    """A step of the study's starting run, by its tokens/s and full batches."""
    alone_ms: float
    """By how much that step would need to be shorter if the other factors had no effect."""
    text: str
    """In plain words."""


def needed(study: Study, claim: Claim, split: Split) -> Needed | None:
    """Return the effect that the study's ratio requires in addition to the other parts of `split`.

    None where the question does not arise: the claim compares no two runs by throughput, the split is of another
    measure or incomplete, or the claim's factor is not a separate factor in it.
    """
    if not isinstance(claim, ContrastClaim) or split.measure is not THROUGHPUT:
        return None
    start, end = (study.run(name) for name in claim.ends)
    own = [part for part in split.parts if part.factor == claim.factor and part.estimate is not None]
    if not own or any(THROUGHPUT.name not in run.figures for run in (start, end)):
        return None
    rates = [sum(run.figures[THROUGHPUT.name]) / 2 for run in (start, end)]
    others = [part.estimate for part in split.parts if part.factor != claim.factor and part.estimate is not None]
    missing = _less(math.log(rates[1] / rates[0]), others)
    step_ms = 1000.0 * tokens_a_step(study.settings(start.name)) / rates[0]
    regimes = set(split.regimes.values())
    regime = regimes.pop() if len(regimes) == 1 else "mixed"
    made = Needed(
        claim=claim.id,
        factor=claim.factor,
        regime=regime,
        paper_ratio=rates[1] / rates[0],
        estimate=missing,
        step_ms=step_ms,
        alone_ms=step_ms * (1 - rates[0] / rates[1]),
        text="",
    )
    names = [part.factor for part in split.parts if part.factor != claim.factor and part.estimate is not None]
    text = _text(study, claim, made, names, sum(part.value for part in others))
    return replace(made, text=text)


def _less(total: float, others: list[Estimate]) -> Estimate:
    """Subtract the others' sum from `total`, which counts as exact.

    Half-widths are added, which is valid however the parts are correlated."""
    value = total - sum(part.value for part in others)
    ends = [
        (part.value - part.low, part.high - part.value)
        for part in others
        if part.low is not None and part.high is not None
    ]
    if len(ends) < len(others):
        return Estimate(value=value, why_no_interval="the other parts have none: repeat the trials")
    return Estimate(value=value, low=value - sum(up for _, up in ends), high=value + sum(down for down, _ in ends))


def _text(study: Study, claim: ContrastClaim, made: Needed, names: list[str], others: float) -> str:
    start, end = claim.ends
    ratio = f"x{made.paper_ratio:.3f}"
    said = [f"From run {start} to run {end} of {study.id} tokens/s rose {ratio}."]
    if names:
        ends = "" if made.estimate.low is None else _interval(made.estimate)
        said.append(
            f"Here ({made.regime}) {' and '.join(names)} alone gave x{math.exp(others):.3g}. To reach {ratio} in total "
            f"{claim.factor}={claim.of} over {claim.over} would need an effect of x{made.estimate.ratio:.3g}{ends}."
        )
    if names and made.regime != study.regime:
        said.append(
            f"This number holds for this machine in this regime. It does not transfer to {study.card}, whose runs are "
            f"assumed to be {study.regime}."
        )
    said.append(
        f"If nothing else contributed, it would have to give the whole {100 * (made.paper_ratio - 1):+.1f} %: "
        f"{made.alone_ms:,.0f} ms of run {start}'s step of {made.step_ms:,.0f} ms, if its batches were full."
    )
    return " ".join(said)


def _interval(found: Estimate) -> str:
    return f" (95 %: x{math.exp(found.low or 0.0):.3g} to x{math.exp(found.high or 0.0):.3g})"
