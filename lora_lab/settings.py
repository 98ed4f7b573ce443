"""Describe a setting once, in the metadata of its field: what it is, its limits, and what it can change.

Validation, `--help`, fingerprints and the report's factors read it from there.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass
from enum import Enum
from typing import Any, get_args, get_origin


class Effect(Enum):
    """What a setting can change."""

    result = "result"
    """What a trial measures: part of its fingerprint, and a factor of the report."""
    circumstance = "circumstance"
    """How or where the same point ran: part of its fingerprint or conditions, never a factor."""
    none = "none"
    """Nothing that a trial measures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The values that a number may have. Others make no sense, or are larger than a computer can count."""

    above: float | None = None
    """Greater than this."""
    least: float | None = None
    """This or greater."""
    below: float | None = None
    """Less than this."""
    most: float | None = None
    """This or less."""

    def fault(self, key: str, value: float) -> str:
        """Say what is wrong with this value; empty when nothing is."""
        low = self.above if self.above is not None else self.least
        # `not x > 0` instead of `x <= 0`, so that nan is invalid as well
        too_low = low is not None and not (value > low if self.above is not None else value >= low)
        high = self.below if self.below is not None else self.most
        too_high = high is not None and not (value < high if self.below is not None else value <= high)
        if not too_low and not too_high:
            return ""
        if value == math.inf:
            return f"{key}=inf must be finite."
        words = [self._low_words()] if too_low else []
        words += [self._high_words()] if too_high else []
        if self.below is not None or (self.most or math.inf) < 100:  # both ends are worth naming
            words = [self._low_words(), self._high_words()]
        return f"{key}={value} must be {' and '.join(words)}."

    def _low_words(self) -> str:
        return f"greater than {self.above:g}" if self.above is not None else f"at least {self.least:g}"

    def _high_words(self) -> str:
        return f"less than {self.below:g}" if self.below is not None else f"at most {self.most:,}"


def setting(
    default: Any = MISSING,
    help: str = "",
    *,
    factory: Callable[[], Any] | None = None,
    effect: Effect = Effect.result,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> Any:
    """Make the field of a setting.

    Args:
        help: what it is, in which unit; one line of `--help`.
        factory: makes the default, for lists and groups.
        above, least, below, most: limits of a number; see Limits.
    """
    metadata = {"help": help, "effect": effect}
    if (above, least, below, most) != (None, None, None, None):
        metadata["limits"] = Limits(above=above, least=least, below=below, most=most)
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting or a group of settings, as its field describes it."""

    key: str
    """Its dotted path."""
    field: dataclasses.Field[Any]

    @property
    def help(self) -> str:
        """Return its description."""
        return str(self.field.metadata.get("help", ""))

    @property
    def limits(self) -> Limits | None:
        """Return its limits; None without any."""
        return self.field.metadata.get("limits")

    @property
    def effect(self) -> Effect:
        """Return what it can change."""
        effect: Effect = self.field.metadata.get("effect", Effect.result)
        return effect

    @property
    def group(self) -> Any:
        """Return the dataclass of a group, also of an optional one; None for a setting, which a list of them is too."""
        if get_origin(self.field.type) is list:
            return None
        return next(
            (part for part in (self.field.type, *get_args(self.field.type)) if dataclasses.is_dataclass(part)), None
        )


def settings_of(schema: Any, prefix: str = "") -> Iterator[Setting]:
    """Yield every setting of a schema, groups included, a group before what is in it."""
    for field in dataclasses.fields(schema):
        found = Setting(f"{prefix}{field.name}", field)
        yield found
        if found.group is not None:
            yield from settings_of(found.group, f"{found.key}.")
