"""Judge a sweep's points by the memory that they need: plan=fits runs only those that can fit."""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from rich.console import Console

from lora_lab.config import AUTO, InvalidInput
from lora_lab.fit.beforehand import beforehand, capacity, verdict_of
from lora_lab.fit.estimate import FITS, GIB, TOO_LARGE
from lora_lab.options import Plan
from lora_lab.store.sweep_folder import Planned, TooLarge
from lora_lab.sweep.display import progress
from lora_lab.sweep.plan import GridPoint
from lora_lab.trial.devices import choose_placement


@dataclass(slots=True)
class Judged:
    """What plan=fits says of a sweep's points, each by its digest. Without plan=fits nothing is said."""

    fit: list[str] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)
    too_large: dict[str, TooLarge] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    """Why nothing is known of a point. It runs."""

    def once(self, trials: Sequence[Planned]) -> list[Planned]:
        """Return the trials without the repeats of points that are not run."""
        kept = [trial for trial in trials if trial.repeat == 0 or trial.point not in self.too_large]
        return [replace(trial, number=number) for number, trial in enumerate(kept)]

    def know(self, measured: Iterable[str]) -> None:
        """Let points run of which trials were measured before, whatever their estimate says."""
        for point in self.too_large.keys() & set(measured):
            del self.too_large[point]
            self.unknown[point] = "a trial was measured before, which says more"


def judged(points: Sequence[GridPoint]) -> Judged:
    """Judge each point that has plan=fits.

    Raises: InvalidInput when repeats=auto would compare points that are not run."""
    found = Judged()
    chosen = [point for point in points if point.config.plan is Plan.fits]
    if not chosen:
        return found
    with progress("estimating the points' memory", len(chosen)) as seen:
        for done, point in enumerate(chosen, 1):
            _judge(point, found)
            seen(done)
    if found.too_large and chosen[0].config.repeats == AUTO:
        lines = [
            f"{' '.join(point.overrides)}: {found.too_large[point.digest].reason}."
            for point in chosen
            if point.digest in found.too_large
        ]
        raise InvalidInput(
            "repeats=auto compares points, and plan=fits would leave some out. Leave them out of the sweep, or type "
            "plan=all.",
            *lines,
        )
    return found


def _judge(point: GridPoint, found: Judged) -> None:
    cards = choose_placement(point.config.device).cards
    if not cards:
        found.unknown[point.digest] = "no NVIDIA card is used"
        return
    there = capacity(point.config, min(card.total_bytes for card in cards))
    try:
        known = beforehand(point.config)
        if known.estimate is None:
            found.unknown[point.digest] = known.reason
        elif (verdict := verdict_of(known.estimate, there)) == TOO_LARGE:
            found.too_large[point.digest] = TooLarge(low_gib=known.estimate.low / GIB, card_gib=there / GIB)
        else:
            (found.fit if verdict == FITS else found.doubtful).append(point.digest)
    except Exception as fault:  # an estimate is worth less than a trial; the verdict replays the allocator
        found.unknown[point.digest] = f"the estimate failed ({type(fault).__name__}: {fault})"


def show_judged(found: Judged, trials: Sequence[Planned]) -> None:
    """Print what plan=fits will run, what it will not, and why."""
    if not (found.fit or found.doubtful or found.too_large or found.unknown):
        return
    names = {trial.point: trial.label for trial in trials}
    _line(
        f"plan=fits: {len(found.fit)} fit, {len(found.doubtful)} doubtful and tried, {len(found.too_large)} skipped"
        + (f", {len(found.unknown)} run without an estimate" if found.unknown else "")
    )
    for digest in found.doubtful:
        _line(f"  doubtful: {names[digest]}")
    for digest, why in found.too_large.items():
        _line(f"  skipped: {names[digest]}: {why.reason}")
    for reason, count in Counter(found.unknown.values()).items():
        _line(f"  without an estimate: {count} of the points: {reason}")


def _line(text: str) -> None:
    Console(file=sys.stdout).print(text, highlight=False, markup=False, soft_wrap=True)
