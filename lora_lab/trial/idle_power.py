"""What a trial's cards draw while nobody uses them, measured before the trials it is subtracted from."""

import contextlib
import functools
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

LONGEST_SECONDS = 30.0
"""A card that has just worked gets so long to come to rest."""

SETTLED_SHARE = 0.05
"""At rest, two halves of the measurement differ by no more than this."""

_EDGE_SECONDS = AVERAGE_SECONDS / 2 + 0.3
"""Read before and after, so that a counter's ticks lie on both sides, and what an average tells half its time late."""

_FILE = "idle.json"


Watched = tuple[Idle, list[Sample]]
"""A draw, and the readings that it is made of."""


def measure_idle(placement: Placement, seconds: float, waiting: Callable[[str], None]) -> Watched | str:
    """Watch the cards for `seconds`, again until they have come to rest.

    The state is that without any process on a card, so without a CUDA context: with one a card draws more.

    Returns: their draw and the readings, or why it is not known.
    """
    waiting(f"measuring what {placement.name} draws at rest ({seconds:g} s)")
    with Sampler(functools.partial(read_cards, placement.cards)) as sampler:
        begin = time.monotonic()
        time.sleep(_EDGE_SECONDS)
        while True:
            start = time.monotonic()
            time.sleep(seconds + _EDGE_SECONDS)
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
    """Mean of the power readings; only to see whether it still falls."""
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
    """What an earlier trial of the same block of a sweep measured, in the same start of it; None when it is to be
    measured now."""
    name = _measured_by(sweep).get(_key(placement, block, owner))
    with contextlib.suppress(Damaged):
        return None if name is None else TrialFolder(sweep / name).idle()
    return None


def keep_for_block(trial: Path, placement: Placement, block: int, owner: Owner) -> None:
    """Let the other trials of the block have what `trial` has in its folder.

    Raises: OSError."""
    file = trial.parent / _FILE
    write_json(file, _measured_by(trial.parent) | {_key(placement, block, owner): trial.name})


def _measured_by(sweep: Path) -> dict[str, str]:
    """Which trials measured for which blocks; none where that cannot be read: it is measured again."""
    with contextlib.suppress(Damaged):
        return whole(dict[str, str], sweep / _FILE) or {}
    return {}


def _key(placement: Placement, block: int, owner: Owner) -> str:
    cards = ",".join(card.uuid for card in placement.cards)
    return f"{cards}, block {block}, process {owner.pid} of {owner.started}"
