"""Facts that the parent observes and a trial's figures need; kept as seen.json in the trial's folder."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Idle:
    """Power that the card draws while nobody uses it."""

    watts: float
    error_watts: float
    """A bound, as in telemetry/energy.py; the sensor's own gain and offset are not included."""
    source: str
    """As for an energy: counter, instant_power or average_power."""
    start: float
    """From when to when it was measured, in time.monotonic() seconds; the readings are in idle.jsonl."""
    end: float
    state: str
    """The card's state, in words."""
    measured_ms: int
    """When; Unix time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stated:
    """What the user stated and nobody measured. Figures made from it have names of their own."""

    board_power_watts: float | None = None
    price_per_kwh: float | None = None
    co2_grams_per_kwh: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """What lora_lab.fit said of the trial's memory, in bytes. Rows were taken as full."""

    allocated: int
    reserved: int
    card: int
    """Of the worker's process."""
    low: int
    """What a card must have at the very least."""
    enough: int
    """What a card must have so that it is enough."""
    high: int
    """The most that the worker's process takes of a card that has plenty."""
    slots: int
    """Token positions of a step of full rows."""
    verdict: str
    """Whether that fits the card, in lora_lab.fit's words."""


@dataclass(slots=True, kw_only=True)
class HostFacts:
    """What the parent observed, and what the user stated."""

    no_sensor: str = ""
    """Why there are no samples of a card, or none up to the end; empty when there are."""
    no_cpu_sensor: str = ""
    """Why there are no samples of the CPU's energy."""
    idle: Idle | None = None
    no_idle: str = "it was not measured"
    """Why there is no `idle`."""
    used_before_bytes: int | None = None
    """Device memory in use just before the worker began."""
    card_bytes: int | None = None
    """All memory of the card."""
    estimate: MemoryEstimate | None = None
    no_estimate: str = "nothing was estimated beforehand"
    """Why there is no `estimate`."""
    members: int = 1
    """How many trials trained together in the worker."""
    parent_pid: int | None = None
    """This process."""
    stated: Stated = field(default_factory=Stated)
    warnings: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
