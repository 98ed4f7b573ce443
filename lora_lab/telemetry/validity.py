"""Judge whether a trial's figures may be compared: was the card not shared, cool, and at one clock speed?

Nothing is discarded for it. A run is marked `invalid` when something outside its configuration changed its figures,
`doubtful` when something may have, `unknown` when nobody could look.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median

from lora_lab.events import Event, PhaseMemory
from lora_lab.phase import Phase
from lora_lab.telemetry.figures import Summary
from lora_lab.telemetry.gpu_processes import foreign_pids
from lora_lab.telemetry.host_facts import HostFacts
from lora_lab.telemetry.sampler import Sample
from lora_lab.telemetry.window import Window

THROTTLED_SHARE = 0.01
"""Share of the window's time from which heat or a power brake make it invalid."""

DRIFT_CELSIUS = 10.0
CLOCK_SPREAD = 0.10
"""Largest spread between the slowest and the fastest clock, as a share of the median clock."""

# NVML's bits of Sample.slowdowns, for cards without the counters
_POWER_CAP, _THERMAL, _BRAKE = 0x4, 0x20 | 0x40, 0x80


def add_validity(
    summary: Summary, events: Sequence[Event], window: Window | None, samples: Sequence[Sample], seen: HostFacts
) -> None:
    """Add the figures behind the verdict, and the tags `validity` and `validity_reasons`."""
    invalid: list[str] = []
    doubtful: list[str] = []
    _add_neighbours(summary, events, samples, seen, invalid)
    _add_retries(summary, events, doubtful)
    if "vram/spilled_gib" in summary.metrics:
        gib = summary.metrics["vram/spilled_gib"]
        invalid.append(f"{gib:.1f} GiB of device memory lay in main memory (the driver of a WSL2 host does that)")
    watched = [s for s in samples if s.slowdowns is not None or s.sm_mhz is not None]
    known = _add_cards(summary, window, watched, invalid, doubtful)
    verdict = "invalid" if invalid else "doubtful" if doubtful else "valid" if known else "unknown"
    summary.tags["validity"] = verdict
    reasons = [*dict.fromkeys([*invalid, *doubtful])]
    if verdict == "unknown":
        unwatched = "no window was completed" if window is None else "the card's clocks were not read within the window"
        reasons = [seen.no_sensor or unwatched]
    if reasons:
        summary.tags["validity_reasons"] = "; ".join(reasons)


def _add_cards(
    summary: Summary, window: Window | None, watched: Sequence[Sample], invalid: list[str], doubtful: list[str]
) -> bool:
    """Add how slow, warm and steady the cards were: of several the most, and the lowest clocks.

    Returns: whether each of them was watched within the window."""
    cards = sorted({sample.card for sample in watched})
    known = bool(cards)
    for card in cards:
        own = [sample for sample in watched if sample.card == card]
        parts = [] if window is None else [part.inside(own) for part in window.stretches]
        slow = [sample for part in parts for sample in part]
        if len(slow) < 2:
            known = False
            continue
        found = Summary()
        _add_slowdowns(found, parts, invalid)
        _add_drift(found, slow, doubtful, is_job=len(parts) > 1)
        for name, value in found.metrics.items():
            both = (value, summary.metrics.get(name, value))
            summary.metrics[name] = min(both) if name.endswith("_median") else max(both, key=abs)
    return known


def _add_neighbours(
    summary: Summary, events: Sequence[Event], samples: Sequence[Sample], seen: HostFacts, invalid: list[str]
) -> None:
    if not any(sample.processes is not None for sample in samples):
        return
    if not any(sample.processes for sample in samples):
        summary.absent["card/foreign_processes"] = "the driver lists no process, not even the worker's"
        return
    foreign = foreign_pids(events, samples, seen.parent_pid)
    summary.metrics["card/foreign_processes"] = float(len(foreign))
    if foreign:
        listed = ", ".join(str(pid) for pid in sorted(foreign))
        invalid.append(f"other processes calculated on the card (as the driver numbers them: {listed})")


def _add_retries(summary: Summary, events: Sequence[Event], doubtful: list[str]) -> None:
    told = [e.retries for e in events if isinstance(e, PhaseMemory) and e.phase == Phase.window.value]
    if not told:
        return
    retries = sum(told)
    summary.metrics["vram/allocator_retries"] = float(retries)
    if retries:
        doubtful.append(
            f"memory was so short that torch's allocator gave back all it kept and asked again {retries} times in the "
            "window; a little more room would be faster"
        )


def _add_slowdowns(summary: Summary, parts: Sequence[Sequence[Sample]], invalid: list[str]) -> None:
    thermal = _share(parts, lambda s: s.thermal_seconds, _THERMAL)
    brake = _share(parts, lambda s: s.brake_seconds, _BRAKE)
    power = _share(parts, lambda s: s.power_cap_seconds, _POWER_CAP)
    shares = {"thermal_share": thermal, "brake_share": brake, "power_cap_share": power}
    summary.metrics |= {f"card/{name}": share for name, share in shares.items() if share is not None}
    for share, what in ((thermal, "heat"), (brake, "a power brake signal")):
        if share is not None and share > THROTTLED_SHARE:
            invalid.append(f"{what} held the clocks down for {share:.0%} of the window")


def _share(parts: Sequence[Sequence[Sample]], counter: Callable[[Sample], float | None], bit: int) -> float | None:
    """Return the share of the time between the first and last sample of each stretch: by the card's own counter, or by
    samples."""
    held = watched = 0.0
    for part in parts:
        told = [(sample.t, seconds) for sample in part if (seconds := counter(sample)) is not None]
        if len(told) >= 2 and all(after[1] >= before[1] for before, after in pairwise(told)):
            (t0, first), (t1, last) = told[0], told[-1]
            held, watched = held + (last - first), watched + (t1 - t0)
    if watched:
        return min(1.0, held / watched)
    masks = [sample.slowdowns for part in parts for sample in part if sample.slowdowns is not None]
    return sum(bool(mask & bit) for mask in masks) / len(masks) if masks else None


def _add_drift(summary: Summary, slow: Sequence[Sample], doubtful: list[str], is_job: bool) -> None:
    """Add how temperature and clocks changed.

    A job heats its card up, and a longer warm-up would not change that. Over hours some reading of the clock is an
    outlier: the spread of a job leaves out a hundredth at either end."""
    degrees = [sample.temperature_celsius for sample in slow if sample.temperature_celsius is not None]
    if degrees:
        drift = degrees[-1] - degrees[0]
        summary.metrics |= {"card/window_end_celsius": degrees[-1], "card/temperature_drift_celsius": drift}
        if abs(drift) > DRIFT_CELSIUS and not is_job:
            doubtful.append(
                f"the card's temperature changed by {drift:+.0f} degrees within the window; a longer warm-up would "
                "have steadied it"
            )
    clocks = [sample.sm_mhz for sample in slow if sample.sm_mhz is not None]
    if clocks:
        usual = median(clocks)
        ordered = sorted(clocks)
        outliers = len(clocks) // 100 if is_job else 0
        spread = (ordered[-1 - outliers] - ordered[outliers]) / usual if usual else 0.0
        summary.metrics |= {"card/sm_mhz_median": usual, "card/sm_clock_spread": spread}
        capped = summary.metrics.get("card/power_cap_share", 0.0) > THROTTLED_SHARE
        if spread > CLOCK_SPREAD and not capped:  # under a power cap clocks follow the load: that is how it caps
            doubtful.append(f"the card's clock varied by {spread:.0%} within the window, and not for its power limit")
    memory = [sample.memory_mhz for sample in slow if sample.memory_mhz is not None]
    if memory:
        summary.metrics["card/memory_mhz_median"] = median(memory)
