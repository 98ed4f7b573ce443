"""Result of checking a trial before it runs."""

from dataclasses import dataclass

from lora_lab.work import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Result of checking a config's tokenizer, model shapes and rows, with nothing loaded onto a device."""

    faults: tuple[str, ...] = ()
    """Faults for which the trial would be refused."""
    work: Workload | None = None
    """The trial's work, for a forecast; None unless it was asked for and can be counted."""
