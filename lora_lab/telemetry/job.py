"""Add up a whole job: what it took from its first step to its end, over all attempts.

The steady figures (throughput, J/token) leave out evaluations and checkpoints; these do not. Time between attempts is
not counted, and neither are loading and compiling before each attempt's first step. Steps that a kill or a spike made
the job take again are counted in hours and energy, and not in steps and tokens.
"""

import math
from collections.abc import Sequence

from lora_lab.events import Evaluated, Event, PhaseBegan, Step
from lora_lab.job_events import Checkpointed, JobPlanned, Resumed, Spiked
from lora_lab.phase import Phase
from lora_lab.telemetry.attempts import counting, with_samples
from lora_lab.telemetry.energy import Energy, energy_of
from lora_lab.telemetry.energy_figures import JOULES_PER_KWH, of_card
from lora_lab.telemetry.figures import Summary
from lora_lab.telemetry.host_facts import HostFacts
from lora_lab.telemetry.phases import spans
from lora_lab.telemetry.sampler import Sample
from lora_lab.telemetry.window import Window

EDGE_SECONDS = 1.0
"""The energy of an attempt ends this long before its last reading: a tick of the counter has to lie behind the end."""

LONGEST_CUT_SECONDS = 10.0
"""Where the readings end earlier than this before the attempt, its energy is not known."""

_ENERGY = ("job/kwh", "job/joules_per_token")


def add_job(summary: Summary, events: Sequence[Event], samples: Sequence[Sample], seen: HostFacts) -> None:
    """Add every figure below `job/`, where the worker planned a job."""
    planned = next((event for event in reversed(events) if isinstance(event, JobPlanned)), None)
    if planned is None:
        return
    kept = counting(events)
    steps = [event for event in kept if isinstance(event, Step)]
    taken = sum(isinstance(event, Step) for event in events)
    attempts = with_samples(events, samples)
    trained = [span for said, _ in attempts if (span := _trained(said)) is not None]
    real = sum(step.real for step in steps)
    last = max((step.step for step in steps), default=0)
    summary.metrics |= {
        "job/attempts": float(len(attempts)),
        "job/hours": sum(end - start for start, end in trained) / 3600,
        "job/steps": float(len(steps)),
        "job/steps_planned": float(planned.steps),
        "job/steps_taken_again": float(taken - len(steps)),
        "job/epochs": last / planned.steps_per_epoch,
        "job/tokens": float(real),
        "job/trained_tokens": float(sum(step.trained for step in steps)),
        "job/checkpoints": float(len(_checkpoints(events))),
        "job/spikes": float(sum(isinstance(event, Spiked) for event in events)),
    }
    _add_evaluations(summary, kept)
    phases = spans(events)
    for phase in (Phase.evaluation, Phase.checkpoint):
        ended = [end - start for start, end in phases.get(phase.value, []) if end < math.inf]
        summary.metrics[f"job/{phase.value}_seconds"] = sum(ended)
    _add_energy(summary, attempts, real, seen)


def _trained(said: Sequence[Event]) -> tuple[float, float] | None:
    """Return from when to when an attempt trained: from its warm-up's beginning to its last event."""
    begin = next((e.t for e in said if isinstance(e, PhaseBegan) and e.phase == Phase.warm_up.value), None)
    return None if begin is None else (begin, max(event.t for event in said))


def _checkpoints(events: Sequence[Event]) -> set[int]:
    """Return the steps at which there was a checkpoint. One that was complete just before a kill is known by the
    attempt that went on from it."""
    found: set[int] = set()
    for event in events:
        if isinstance(event, Resumed):
            found = {step for step in found if step <= event.step} | ({event.step} if event.folder else set())
        elif isinstance(event, Checkpointed):
            found.add(event.step)
    return found


def _add_evaluations(summary: Summary, kept: Sequence[Event]) -> None:
    found = [event for event in kept if isinstance(event, Evaluated) and event.step is not None]
    summary.metrics["job/evaluations"] = float(len(found))
    best = min((e for e in found if not math.isnan(e.loss)), key=lambda event: event.loss, default=None)
    why = "the held-out rows were not evaluated between two steps"
    summary.add("job/best_heldout_loss", None if best is None else best.loss, why)
    summary.add("job/best_step", None if best is None or best.step is None else float(best.step), why)


def _add_energy(
    summary: Summary, attempts: Sequence[tuple[Sequence[Event], Sequence[Sample]]], real: int, seen: HostFacts
) -> None:
    price = seen.stated.price_per_kwh
    names = (*_ENERGY, "job/cost") if price is not None else _ENERGY
    measured = _measured(attempts)
    if isinstance(measured, str):
        summary.without(names, seen.no_sensor or measured)
        return
    joules, error = measured
    summary.metrics |= {"job/kwh": joules / JOULES_PER_KWH, "job/kwh_error": error / JOULES_PER_KWH}
    summary.add("job/joules_per_token", joules / real if real else None, "no training step was finished")
    if price is not None:
        summary.metrics["job/cost"] = joules / JOULES_PER_KWH * price


def _measured(attempts: Sequence[tuple[Sequence[Event], Sequence[Sample]]]) -> tuple[float, float] | str:
    """Return the joules of the card in all attempts and their error bound, or why they are not known.

    What an attempt drew between its last readings and its last event is not seen. The bound holds it, at the attempt's
    mean power."""
    joules = error = 0.0
    known = False
    for said, taken in attempts:
        span, read = _trained(said), of_card(taken)
        if span is None:
            continue
        if not read:
            return "no power sensor was read"
        start, end = span
        until = min(end, read[-1].t - EDGE_SECONDS)
        if end - until > LONGEST_CUT_SECONDS:
            return f"the card was not read in the last {end - until:.0f} s of an attempt"
        if until <= start:
            continue
        energy: Energy = energy_of(Window(start, until, ()), read)[0]
        if energy.joules is None or energy.error_joules is None:
            return energy.reason
        known = True
        joules += energy.joules
        error += energy.error_joules + energy.joules / (until - start) * (end - until)
    return (joules, error) if known else "no attempt trained for long enough to measure its energy"
