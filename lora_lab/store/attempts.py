"""Join what all attempts at a job left into the inputs of its figures."""

from collections.abc import Mapping
from dataclasses import replace

from lora_lab.events import Event
from lora_lab.store.trial_folder import Inputs
from lora_lab.telemetry.attempts import moved, moved_samples
from lora_lab.telemetry.host_facts import HostFacts
from lora_lab.telemetry.sampler import Sample

_PLACE = ("device", "device.uuid", "device.driver", "device.cores", "machine.cpu", "code")
"""Tags that say where an attempt ran, besides the versions."""

_WAITING = "time/waiting_seconds"


def joined(earlier: list[Inputs], latest: Inputs) -> Inputs:
    """Return the inputs of all attempts as one, on the latest one's clock; the latest alone as it is.

    `asked` is the latest one's, except for the time at which the job was asked for."""
    if not earlier:
        return latest
    events: list[Event] = []
    samples: list[Sample] = []
    for attempt in earlier:
        later = attempt.asked.unix_minus_monotonic - latest.asked.unix_minus_monotonic
        events += moved(attempt.events, later)
        samples += moved_samples(attempt.samples, later)
    first = earlier[0].asked
    asked_t = first.t + first.unix_minus_monotonic - latest.asked.unix_minus_monotonic
    return Inputs(
        asked=replace(latest.asked, t=asked_t),
        events=events + latest.events,
        samples=samples + latest.samples,
        seen=_seen([attempt.seen for attempt in earlier], latest.seen),
    )


def moved_from(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return what differs between the places of two attempts, by their tags; empty where nothing does."""
    names = [name for name in {**before, **now} if name in _PLACE or name.startswith("version.")]
    differ = [name for name in names if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {before.get(name, 'none')} -> {now.get(name, 'none')}" for name in differ)


def seconds_between(earlier: list[Inputs], latest: Inputs) -> float:
    """Return how long no attempt ran: from the last event of each to when the next one was asked for."""
    every = [*earlier, latest]
    ends = [max((e.t for e in one.events), default=one.asked.t) + one.asked.unix_minus_monotonic for one in every]
    begins = [one.asked.t + one.asked.unix_minus_monotonic for one in every]
    return sum(max(0.0, begin - end) for end, begin in zip(ends, begins[1:], strict=False))


def _seen(earlier: list[HostFacts], latest: HostFacts) -> HostFacts:
    """Return what the parents of all attempts saw: the latest one's, and what it lacks or adds to."""
    every = [*earlier, latest]
    waited = {_WAITING: earlier[0].metrics[_WAITING]} if _WAITING in earlier[0].metrics else {}
    return replace(
        latest,
        idle=next((seen.idle for seen in reversed(every) if seen.idle is not None), None),
        estimate=next((seen.estimate for seen in every if seen.estimate is not None), None),
        used_before_bytes=next((s.used_before_bytes for s in reversed(every) if s.used_before_bytes is not None), None),
        warnings=[*dict.fromkeys(warning for seen in every for warning in seen.warnings)],
        metrics=latest.metrics | waited,
    )
