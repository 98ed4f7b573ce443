"""What can be said of a trial before it runs."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What the tokenizer, the model's shapes and the rows tell of a config, with nothing loaded onto a device."""

    faults: tuple[str, ...] = ()
    """What a trial would be refused for."""
