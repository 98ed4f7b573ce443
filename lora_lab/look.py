"""Result of checking a trial before it runs."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Result of checking a config's tokenizer, model shapes and rows, with nothing loaded onto a device."""

    faults: tuple[str, ...] = ()
    """Faults for which the trial would be refused."""
