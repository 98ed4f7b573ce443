"""The effect that one factor would need for a study's printed ratio.

The study compares two runs between which several factors changed. This machine's split of the same two points says how
much of the log ratio the other factors make here; what is then missing from the study's ratio is what the claim's
factor would need to contribute, if the other factors have the same effects there as here.

The split of the GPU's own work is taken where there is one. Where the host is what is waited for, a step takes as long
whatever its size, so tokens/s follow the tokens per step by definition; the GPU's work does not depend on the host."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora_lab.report.answers.claims.study import Claim, ContrastClaim, Study
from lora_lab.report.measures import GPU_WORK, THROUGHPUT
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
    by_gpu_work: bool
    """Whether it follows from the GPU's own work; else from tokens/s."""
    others: float
    """What the other factors made of tokens/s here, as a log ratio."""
    own: Estimate
    """What the claim's factor itself made of tokens/s here."""
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


def needed(study: Study, claim: Claim, splits: Sequence[Split]) -> Needed | None:
    """Return the effect that the study's ratio requires in addition to the other parts of the split.

    None where the question does not arise: the claim compares no two runs by throughput, no split of throughput or GPU
    work is complete, or the claim's factor is not a separate factor in it.
    """
    if not isinstance(claim, ContrastClaim):
        return None
    start, end = (study.run(name) for name in claim.ends)
    split = _chosen(splits, claim)
    if split is None or any(THROUGHPUT.name not in run.figures for run in (start, end)):
        return None
    by_gpu_work = split.measure is GPU_WORK
    parts = {
        part.factor: _negated(part.estimate) if by_gpu_work else part.estimate
        for part in split.parts
        if part.estimate is not None
    }
    own = parts.pop(claim.factor)
    rates = [sum(run.figures[THROUGHPUT.name]) / 2 for run in (start, end)]
    regimes = set(split.regimes.values())
    step_ms = 1000.0 * tokens_a_step(study.settings(start.name)) / rates[0]
    made = Needed(
        claim=claim.id,
        factor=claim.factor,
        regime=regimes.pop() if len(regimes) == 1 else "mixed",
        by_gpu_work=by_gpu_work,
        others=math.fsum(part.value for part in parts.values()),
        own=own,
        paper_ratio=rates[1] / rates[0],
        estimate=_less(math.log(rates[1] / rates[0]), list(parts.values())),
        step_ms=step_ms,
        alone_ms=step_ms * (1 - rates[0] / rates[1]),
        text="",
    )
    return replace(made, text=_text(study, claim, made, list(parts)))


def _chosen(splits: Sequence[Split], claim: ContrastClaim) -> Split | None:
    """Return the split of GPU work in which the claim's factor has a part, else that of throughput."""
    for measure in (GPU_WORK, THROUGHPUT):
        for split in splits:
            known = {part.factor for part in split.parts if part.estimate is not None}
            if split.measure is measure and claim.factor in known:
                return split
    return None


def _negated(found: Estimate) -> Estimate:
    """Return a change of time per token as one of tokens per time."""
    low, high = (None if end is None else -end for end in (found.high, found.low))
    return replace(found, value=-found.value, low=low, high=high)


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


def _text(study: Study, claim: ContrastClaim, made: Needed, names: list[str]) -> str:
    start, end = claim.ends
    ratio = f"x{made.paper_ratio:.3f}"
    said = [f"From run {start} to run {end} of {study.id} tokens/s rose {ratio}."]
    if names:
        here = "By the GPU's own work here" if made.by_gpu_work else f"Here ({made.regime})"
        said.append(
            f"{here} {' and '.join(names)} alone gave x{math.exp(made.others):.3g}, and {claim.factor}={claim.of} over "
            f"{claim.over} x{made.own.ratio:.3g}{_interval(made.own)}. To reach {ratio} in total it would need an "
            f"effect of x{made.estimate.ratio:.3g}{_interval(made.estimate)}."
        )
    if names and made.by_gpu_work:
        said.append(
            f"The GPU's work does not depend on the host, but it is this card's: on {study.card} its parts can weigh "
            "differently. Memory was not short here, so nothing is said of what paging is for."
        )
    elif names and made.regime != study.regime:
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
    if found.low is None or found.high is None:
        return ""
    return f" (95 %: x{math.exp(found.low):.3g} to x{math.exp(found.high):.3g})"
