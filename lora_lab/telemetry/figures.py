"""Collect the figures of a trial."""

from dataclasses import dataclass, field

GIB = 2**30

TAGS = (
    "energy_source",
    "energy_source_reason",
    "estimate_verdict",
    "idle_source",
    "idle_state",
    "regime",
    "validity",
    "validity_reasons",
)
"""Every tag that a summary can have."""


@dataclass(slots=True)
class Summary:
    """Figures by metric name, and the reason for every figure that is missing."""

    metrics: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    """Where figures come from and how far to trust them: energy_source, validity, regime, ..."""

    def add(self, name: str, value: float | None, reason: str) -> None:
        """Keep a figure, or the reason why it is absent."""
        if value is None:
            self.absent[name] = reason
        else:
            self.metrics[name] = value

    def without(self, names: tuple[str, ...], reason: str) -> None:
        """Mark all of these figures as absent, for one reason."""
        self.absent |= dict.fromkeys(names, reason)
