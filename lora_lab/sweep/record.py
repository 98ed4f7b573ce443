"""Make the record above the trials of a sweep: what was asked for."""

from collections.abc import Sequence

from lora_lab.composition.arguments import as_typed
from lora_lab.secrets import without_secrets
from lora_lab.store.record import Record
from lora_lab.sweep.plan import GridPoint


def sweep_record(
    points: Sequence[GridPoint], arguments: Sequence[str], preset: str | None, is_whole: bool = True
) -> Record:
    """Return the record of a sweep that begins, without where it runs.

    Args:
        arguments: the command line.
        preset: the prepared sweep that was chosen; None without one.
        is_whole: whether no more trials follow than are planned at the start."""
    axes: dict[str, list[str]] = {}
    for point in points:
        for override in point.overrides:
            key, _, value = override.partition("=")
            value = "max" if point.searched and key.lstrip("+") == point.searched else value
            if value not in axes.setdefault(key, []):
                axes[key].append(value)
    searched = {point.searched for point in points} - {""}
    varied = {key: values for key, values in axes.items() if len(values) > 1 or key.lstrip("+") in searched}
    params = {f"axis.{key.lstrip('+~')}": ",".join(values) for key, values in varied.items()}
    repeats = points[0].config.repeats
    if not searched:  # else nobody knows yet, and neither with repeats=auto
        params["points"] = str(len(points))
        if isinstance(repeats, int) and is_whole:
            params |= {"repeats": str(repeats), "trials": str(repeats * len(points))}
    if preset:
        params["sweep"] = str(preset)
    words = " ".join(["python -m lora_lab -m", *(without_secrets(as_typed(argument)) for argument in arguments)])
    name = f"sweep {preset}" if preset else "sweep of " + (", ".join(varied) or "one point")
    return Record(name=name, is_sweep=True, params=params, tags={"command": words})
