"""Short names of points and levels for tables and pictures."""

from collections import Counter
from collections.abc import Mapping, Sequence

from lora_lab.report.answers.pareto import Point
from lora_lab.report.statistics.factors import SHAPE, Factor
from lora_lab.report.statistics.kinds import Kind
from lora_lab.store.naming import OPTIONS, in_order, word
from lora_lab.store.trials import Place


def level_text(factor: Factor, level: str) -> str:
    """Return a self-explanatory level: "paged_adamw", "2x512", but "raise_to_fp32=False"."""
    if set(factor.keys) <= set(SHAPE):
        return level if len(factor.keys) > 1 else f"{factor.keys[0]}={level}"
    # within a level, shape is one word of several settings
    keys = list(dict.fromkeys("shape" if key in SHAPE else key for key in factor.keys))
    told = zip(keys, level.split(" + "), strict=False)
    return " ".join(word(key, value) for key, value in told)


def usual_levels(points: Sequence[Point], factors: Sequence[Factor]) -> dict[str, str]:
    """Return, by factor, the most common level of numbers and switches: labels leave these out."""
    usual = {}
    for factor in factors:
        found = Counter(point.levels[factor.name] for point in points).most_common(1)
        if found and found[0][1] * 2 > len(points) and "=" in level_text(factor, found[0][0]):
            usual[factor.name] = found[0][0]
    return usual


def levels_text(
    levels: Mapping[str, str], factors: Sequence[Factor], usual: Mapping[str, str], without: str | None = None
) -> str:
    """Return levels in one line, without the usual ones and without the factor named `without`."""
    told = [
        level_text(factor, levels[factor.name])
        for factor in sorted(factors, key=_place)
        if factor.name != without and factor.name in levels and levels[factor.name] != usual.get(factor.name)
    ]
    return " ".join(told)


def _place(factor: Factor) -> int:
    """Return a factor's place in a name."""
    order = in_order([*OPTIONS, "shape", "other"])
    return order.index(factor.name if factor.name in order else "other")


def machine_names(environments: Sequence[tuple[Place, Kind]]) -> list[str]:
    """Return the name of each environment: the machine's device, and where there are several machines, a letter and
    the beginning of its id. Where there are windows and jobs, the kind is added."""
    letters = {place: _letter(number) for number, place in enumerate(dict.fromkeys(place for place, _ in environments))}
    kinds = {kind for _, kind in environments}
    return [
        (f"Machine {letters[place]}: " if len(letters) > 1 else "")
        + place.label
        + (f", {kind.value}s" if len(kinds) > 1 else "")
        for place, kind in environments
    ]


def _letter(number: int) -> str:
    """Return A for 0, Z for 25, then AA."""
    return (_letter(number // 26 - 1) if number >= 26 else "") + chr(ord("A") + number % 26)


def regime_text(regime: str) -> str:
    """Return a self-explanatory regime."""
    return "regime not known" if regime == "not known" else regime


def outcome_text(outcome: str) -> str:
    """Return an outcome in words."""
    return outcome.replace("_", " ")


def count(number: int, one: str) -> str:
    """Return a number with its noun: "1 trial", "3 trials"."""
    return f"{number:,} {one}" + ("" if number == 1 else "s")
