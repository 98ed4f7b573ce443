"""Measure the idle power of a trial's cards, before the trials whose energy it is subtracted from."""

import contextlib
import functools
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from lora_lab.files import write_json
from lora_lab.placement import Placement
from lora_lab.reading import Damaged, whole
from lora_lab.store.process_id import Owner
from lora_lab.store.trial_folder import TrialFolder
from lora_lab.telemetry.energy import AVERAGE_SECONDS
from lora_lab.telemetry.host_facts import Idle
from lora_lab.telemetry.idle_draw import idle_draw
from lora_lab.telemetry.sampler import Sample, Sampler
from lora_lab.telemetry.sensors import read_cards
from lora_lab.trial.interrupt import pause

LONGEST_SECONDS = 30.0
"""A card that has just worked gets this long to come to rest."""

SETTLED_SHARE = 0.05
"""At rest, the two halves of the measurement differ by at most this share."""

_EDGE_SECONDS = AVERAGE_SECONDS / 2 + 0.3
"""Readings are taken this long before and after: a counter's ticks then lie on both sides, and an average lags by half
its period."""

_FILE = "idle.json"
_CHANGES = threading.Lock()
"""Trials of one sweep may run in several threads."""


Watched = tuple[Idle, list[Sample]]
"""An idle power, and the readings that it is calculated from."""


def measure_idle(placement: Placement, seconds: float, waiting: Callable[[str], None]) -> Watched | str:
    """Watch the cards for `seconds`, and again until they are at rest.

    No process is on the cards, so they have no CUDA context: with one a card draws more.

    Returns: the idle power and its readings, or why it is not known.
    """
    waiting(f"measuring the idle power of {placement.name} ({seconds:g} s)")
    with Sampler(functools.partial(read_cards, placement.cards)) as sampler:
        begin = time.monotonic()
        pause(_EDGE_SECONDS)
        while True:
            start = time.monotonic()
            pause(seconds + _EDGE_SECONDS)
            end, samples = start + seconds, list(sampler.samples)
            first, second = (_watts(a, b, samples) for a, b in pairwise((start, (start + end) / 2, end)))
            settled = None
            if first is not None and second is not None:
                settled = abs(second - first) <= SETTLED_SHARE * first
            if settled is not False or time.monotonic() - begin > LONGEST_SECONDS:
                break
    found = idle_draw(start, end, samples)
    if isinstance(found, str):
        return sampler.fault or found
    watts, error_watts, source = found
    state = _state([sample for sample in samples if start <= sample.t <= end])
    rest = {True: "at rest", False: "still coming to rest", None: "whether at rest is not known"}[settled]
    idle = Idle(
        watts=watts,
        error_watts=error_watts,
        source=source,
        start=start,
        end=end,
        state=", ".join(["no process on the card", rest, *state]),
        measured_ms=round(time.time() * 1e3),
    )
    return idle, samples


def _watts(start: float, end: float, samples: list[Sample]) -> float | None:
    """Return the mean of the power readings. It only serves to see whether the power still falls."""
    told = [s.average_watts if s.instant_watts is None else s.instant_watts for s in samples if start <= s.t <= end]
    found = [watts for watts in told if watts is not None]
    return sum(found) / len(found) if found else None


def _state(samples: list[Sample]) -> list[str]:
    last = next((sample for sample in reversed(samples) if sample.temperature_celsius is not None), None)
    if last is None:
        return []
    clock = [] if last.sm_mhz is None else [f"SM clock {last.sm_mhz:.0f} MHz"]
    return [f"{last.temperature_celsius:.0f} degrees C", *clock]


def of_block(sweep: Path, placement: Placement, block: int, owner: Owner) -> Watched | None:
    """Return what an earlier trial of the same block measured in the present start of the sweep; None when it is to be
    measured now."""
    name = _measured_by(sweep).get(_key(placement, block, owner))
    with contextlib.suppress(Damaged):
        return None if name is None else TrialFolder(sweep / name).idle()
    return None


def keep_for_block(trial: Path, placement: Placement, block: int, owner: Owner) -> None:
    """Let the other trials of the block use the idle power in the folder of `trial`.

    Raises: OSError."""
    with _CHANGES:
        write_json(trial.parent / _FILE, _measured_by(trial.parent) | {_key(placement, block, owner): trial.name})


def _measured_by(sweep: Path) -> dict[str, str]:
    """Return which trial measured for which block; nothing where that cannot be read, so it is measured again."""
    with contextlib.suppress(Damaged):
        return whole(dict[str, str], sweep / _FILE) or {}
    return {}


def _key(placement: Placement, block: int, owner: Owner) -> str:
    cards = ",".join(card.uuid for card in placement.cards)
    return f"{cards}, block {block}, process {owner.pid} of {owner.started}"
