"""What fits. Out of memory is a result here, not a failure.

Three kinds of trial are evidence for a budget, the most direct first:

1. A trial within an emulated capacity (vram_limit_gib) that finished fits that budget and every larger one. There the
   card's use may rise by the limit over what it was before the trial, so its peak can lie a little above the budget.
   One that ran out of memory, within an emulated capacity or on the whole card, does not fit that and anything smaller.
2. A trial that finished with the whole card fits a budget that is no smaller than the card's peak use. torch's
   allocator keeps what it is not asked to give back, so a trial with a larger peak might still fit:
   it counts as not fitting, and `next_may_fit` says when what it used of that would have fitted.
3. Of larger budgets than it ran out of, a trial shows only what it held and asked for then.

Of repeats the worst counts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lora_lab.outcome import Outcome
from lora_lab.report.statistics.factors import SHAPE, Factor, tokens_a_step
from lora_lab.store.trials import Trial

BUDGETS_GIB = (6, 8, 10, 12, 16, 24)
"""Memory of common cards."""

LIMIT = "vram_limit_gib"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The most that fits into a budget at one combination of the other factors."""

    budget_gib: float
    others: str
    """The other factors' levels; "" when only the shape varied."""
    largest: str | None
    """The largest shape that fits, by the tokens of a micro-batch (gradient accumulation needs no more memory), then
    of a step; None when none does."""
    largest_gib: float | None
    """What it needs (the card's peak, or torch's share of it, as the note says)."""
    trial: Trial | None
    """The one that needs most of its repeats."""
    next: str | None
    """The smallest larger shape that was tried and does not fit."""
    next_needs_gib: float | None
    """What that needs: measured where it ran on a larger card or budget, else a lower bound."""
    next_is_bound: bool
    """Whether `next_needs_gib` is only a lower bound: what it held when it ran out, and what it asked for then."""
    next_may_fit: bool = False
    """Whether `next` peaked above the budget only by what torch's allocator kept without using it: this was not
    tried."""
    unknown: tuple[str, ...] = ()
    """Shapes that were tried without telling whether they fit into this budget."""
    note: str = ""
    """Notes: trials that contradict each other, peaks that may shrink under pressure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Need:
    """Evidence of one trial."""

    trial: Trial
    ran: bool
    gib: float
    """Its peak where it ran, else a lower bound."""
    limit_gib: float | None
    """The emulated capacity; where it ran out, the card's own without one."""
    squeezed_gib: float
    """Its peak minus what torch's allocator kept without using it."""
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    shape: str
    fits: bool | None
    need: _Need
    may_fit: bool
    notes: tuple[str, ...]


def fits(trials: Sequence[Trial], factors: Sequence[Factor], budgets_gib: Sequence[float] = BUDGETS_GIB) -> list[Fit]:
    """Return what fits, per budget and combination of the factors other than the shape.

    The emulated capacity is a budget itself, so it is not one of these factors. Trials on a CPU are left out, and so
    are combinations without evidence about a budget."""
    found: dict[str, dict[tuple[int, ...], list[_Need]]] = {}
    ordered = sorted(trials, key=lambda trial: [factor.levels.index(factor.level(trial)) for factor in factors])
    for trial in ordered:
        need = _need(trial)
        if need is not None:
            found.setdefault(_others(trial, factors), {}).setdefault(_size(trial.params), []).append(need)
    made = [_fit(budget, others, shapes, factors) for budget in budgets_gib for others, shapes in found.items()]
    return [fit for fit in made if fit is not None]


def _others(trial: Trial, factors: Sequence[Factor]) -> str:
    keys = [key for factor in factors for key in factor.keys if key not in (*SHAPE, LIMIT)]
    told = {key: trial.params.get(key, "None") for key in keys}
    return " ".join(
        value if "." not in key and value.isidentifier() else f"{key}={value}" for key, value in told.items()
    )


def _size(params: Mapping[str, str]) -> tuple[int, ...]:
    """Return the sort key of a shape: tokens of a micro-batch, of a step, and rows."""
    batch, seq_len = int(params.get("batch_size", "1")), int(params.get("seq_len", "1"))
    return batch * seq_len, tokens_a_step(params), batch, seq_len


def _shape(trial: Trial, factors: Sequence[Factor]) -> str:
    keys = [key for factor in factors for key in factor.keys if key in SHAPE] or ["batch_size", "seq_len"]
    return "x".join(trial.params.get(key, "None") for key in keys)


def _need(trial: Trial) -> _Need | None:
    """Return the trial's evidence about memory; None if it has none."""
    if "device.cpu" in trial.tags or trial.tags.get("validity") == "invalid":  # others on the card take memory, too
        return None
    if trial.finished:
        return _of_finished(trial)
    if trial.outcome == Outcome.out_of_memory.value:
        return _of_out_of_memory(trial)
    return None


def _of_finished(trial: Trial) -> _Need | None:
    metrics = trial.metrics
    device, reserved = metrics.get("vram/peak_device_gib"), metrics.get("vram/peak_reserved_gib")
    peak = reserved if device is None else device
    if peak is None:
        return None
    spare = 0.0 if reserved is None else reserved - metrics.get("vram/peak_allocated_gib", reserved)
    note = (
        "the card's memory use was not read; this is torch's allocator without the CUDA context"
        if device is None
        else ""
    )
    limit = _number(trial.params.get(LIMIT))
    return _Need(trial=trial, ran=True, gib=peak, limit_gib=limit, squeezed_gib=peak - spare, note=note)


def _of_out_of_memory(trial: Trial) -> _Need | None:
    """Return a lower bound: more than its limit, or what it held plus what it asked for.

    The CUDA context, which the allocator does not see, is not counted."""
    metrics = trial.metrics
    limit = _number(trial.params.get(LIMIT)) or _number(trial.tags.get("device.memory_gib"))
    held = metrics.get("vram/peak_reserved_gib", metrics.get("out_of_memory/peak_allocated_gib"))
    asked = metrics.get("out_of_memory/asked_gib")
    told = [gib for gib in (limit, held, None if held is None or asked is None else held + asked) if gib is not None]
    if not told:
        return None
    least = max(told)
    return _Need(trial=trial, ran=False, gib=least, limit_gib=limit, squeezed_gib=least, note="")


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _fit(
    budget: float, others: str, shapes: Mapping[tuple[int, ...], Sequence[_Need]], factors: Sequence[Factor]
) -> Fit | None:
    verdicts = [_verdict(budget, _shape(shapes[size][0].trial, factors), shapes[size]) for size in sorted(shapes)]
    fitting = [at for at, verdict in enumerate(verdicts) if verdict.fits]
    most = fitting[-1] if fitting else -1
    refused = [at for at, verdict in enumerate(verdicts) if verdict.fits is False]
    if not fitting and not refused:
        return None
    largest = verdicts[most] if fitting else None
    beyond = next((verdicts[at] for at in refused if at > most), None)
    notes = [f"{told.shape}: {note}" for told in (largest, beyond) if told for note in told.notes]
    notes += [f"{verdicts[at].shape}, though smaller, does not fit" for at in refused if at < most]
    return Fit(
        budget_gib=budget,
        others=others,
        largest=largest.shape if largest else None,
        largest_gib=largest.need.gib if largest else None,
        trial=largest.need.trial if largest else None,
        next=beyond.shape if beyond else None,
        next_needs_gib=beyond.need.gib if beyond else None,
        next_is_bound=beyond is not None and not beyond.need.ran,
        next_may_fit=beyond is not None and beyond.may_fit,
        unknown=tuple(verdict.shape for verdict in verdicts if verdict.fits is None),
        note="; ".join(notes),
    )


def _verdict(budget: float, shape: str, needs: Sequence[_Need]) -> _Verdict:
    """Return whether the shape fits, by its most direct trials, and the trial that shows what it needs."""
    ran = [need for need in needs if need.ran]
    within = [need for need in ran if need.limit_gib is not None and need.limit_gib <= budget]
    free = [need for need in ran if need.limit_gib is None or need.limit_gib > budget]
    out = [need for need in needs if not need.ran]
    refused = [need for need in out if need.limit_gib is not None and need.limit_gib >= budget]
    larger = [need for need in free if need.gib > budget]
    fit: bool | None
    if refused:
        fit, told = False, larger or refused
    elif within:
        fit, told = True, within
    elif free:
        fit, told = not larger, free
    else:
        fit, told = (False if _most(out).gib > budget else None), out
    need = _most(told)
    may_fit = fit is False and not refused and need.ran and need.squeezed_gib <= budget
    notes = [*([need.note] if need.note else []), *_contradictions(budget, refused, within, free)]
    if fit and need.limit_gib is not None and need.gib > budget:
        notes.append(f"its peak of {need.gib:.2f} GiB includes memory in use on the card before the trial")
    if may_fit:
        notes.append(
            f"it peaked at {need.gib:.2f} GiB and used {need.squeezed_gib:.2f} GiB of that: whether it runs within "
            f"{budget:g} GiB was not tried (vram_limit_gib={budget:g})"
        )
    return _Verdict(shape=shape, fits=fit, need=need, may_fit=may_fit, notes=tuple(notes))


def _most(needs: Sequence[_Need]) -> _Need:
    return max(needs, key=lambda need: need.gib)


def _contradictions(
    budget: float, refused: Sequence[_Need], within: Sequence[_Need], free: Sequence[_Need]
) -> Iterator[str]:
    """Yield contradictions between trials at the limit and trials with more memory."""
    if refused and within:
        yield f"one trial ran within {within[0].limit_gib:g} GiB and another ran out of {refused[0].limit_gib:g} GiB"
    if not free:
        return
    peak = _most(free).gib
    if refused and peak <= budget:
        yield f"peaked at {peak:.2f} GiB with more memory, yet ran out of {refused[0].limit_gib:g} GiB, which counts"
    elif within and not refused and peak > budget:
        yield f"peaked at {peak:.2f} GiB with more memory, yet ran within {within[0].limit_gib:g} GiB, which counts"
