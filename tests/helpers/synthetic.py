"""Cards whose power is known at every moment, as a sampler sees them: now and then, through sensors that tick."""

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from hypothesis import strategies as st

from lora_lab.events import Evaluated, Event, PhaseBegan, Step, WindowClosed, WindowOpened
from lora_lab.job_events import Checkpointed, JobPlanned
from lora_lab.phase import Phase
from lora_lab.telemetry.sampler import Sample

ROUNDING = 0.02
"""Joules that whole milliwatts and millijoules make of a window here."""

READ_SECONDS = 0.05
WRAP_JOULES = 2**32 / 1e3
"""Where a counter of 32 bits of millijoules begins again."""


class Power(Protocol):
    """Watts over time."""

    highest: float

    def at(self, t: float) -> float: ...

    def joules(self, t: float) -> float:
        """Drawn from 0 to t, exactly."""
        ...


@dataclass(frozen=True)
class Constant:
    watts: float

    @property
    def highest(self) -> float:
        return self.watts

    def at(self, t: float) -> float:
        return self.watts

    def joules(self, t: float) -> float:
        return self.watts * t


@dataclass(frozen=True)
class Ramp:
    watts: float
    """At 0, as the slope never leads below it."""
    slope: float

    @property
    def highest(self) -> float:
        return self.at(30.0)

    def at(self, t: float) -> float:
        return self.watts + self.slope * t

    def joules(self, t: float) -> float:
        return self.watts * t + self.slope * t * t / 2


@dataclass(frozen=True)
class Square:
    low: float
    highest: float
    period: float
    duty: float
    """Share of the period at the high level."""
    offset: float
    """When a high level began, in periods."""

    def at(self, t: float) -> float:
        return self.highest if (t / self.period - self.offset) % 1 < self.duty else self.low

    def joules(self, t: float) -> float:
        def high_periods(x: float) -> float:
            return math.floor(x) * self.duty + min(x % 1, self.duty)

        high = high_periods(t / self.period - self.offset) - high_periods(-self.offset)
        return self.low * t + (self.highest - self.low) * high * self.period


@dataclass(frozen=True, kw_only=True)
class SyntheticCard:
    """Sensors of a card, and how often it is read."""

    power: Power
    tick: float = 0.1
    """Seconds between two moves of its counter."""
    tick_jitter: float = 0.0
    """Share of a tick by which each comes late, at most."""
    phase: float = 0.0
    """Of a tick: when the first comes."""
    read_jitter: float = 0.0
    """Share of the reading interval by which each reading comes late, at most."""
    gaps: tuple[tuple[float, float], ...] = ()
    """(from, seconds) without a reading."""
    counter_gain: float = 1.0
    power_gain: float = 1.0
    power_offset: float = 0.0
    already: float = 12_345.678
    """Joules on the counter at 0."""
    seed: int = 0

    def samples(self, until: float) -> list[Sample]:
        """Every reading from 0 on."""
        late, later = random.Random(self.seed).random, random.Random(-1 - self.seed).random
        numbers = range(int(until / self.tick) + 4)
        ticks = [(number + self.phase + self.tick_jitter * late() - 2) * self.tick for number in numbers]
        times = [(number + self.read_jitter * later()) * READ_SECONDS for number in range(int(until / READ_SECONDS))]
        return [
            self._sample(t, ticks)
            for t in times
            if not any(begin < t < begin + seconds for begin, seconds in self.gaps)
        ]

    def _sample(self, t: float, ticks: Sequence[float]) -> Sample:
        ticked = ticks[bisect_right(ticks, t) - 1]
        mean = self.power.joules(t) - self.power.joules(t - 1)
        return Sample(
            t=t,
            energy_joules=math.floor((self.already + self.counter_gain * self.power.joules(ticked)) * 1e3) / 1e3,
            instant_watts=round(self.power_gain * self.power.at(t) + self.power_offset, 3),
            average_watts=round(self.power_gain * mean + self.power_offset, 3),
        )

    def drawn(self, start: float, end: float) -> float:
        """Joules that were really drawn."""
        return self.power.joules(end) - self.power.joules(start)


Fault = Callable[[list[Sample]], list[Sample]]


def _counter(samples: list[Sample], change: Callable[[float, float], float]) -> list[Sample]:
    counted = [(s, s.energy_joules) for s in samples]
    return [s if j is None else replace(s, energy_joules=round(change(s.t, j), 3)) for s, j in counted]


def frozen(at: float, seconds: float, catches_up: bool) -> Fault:
    """The counter stands still for a while; what was drawn meanwhile is then on it, or lost."""

    def fault(samples: list[Sample]) -> list[Sample]:
        kept = max((s.energy_joules or 0.0 for s in samples if s.t <= at), default=0.0)
        after = max((s.energy_joules or 0.0 for s in samples if s.t <= at + seconds), default=0.0)
        lost = 0.0 if catches_up else after - kept
        return _counter(samples, lambda t, j: j if t <= at else kept if t <= at + seconds else j - lost)

    return fault


def reset(at: float) -> Fault:
    """The counter begins again at 0: a driver that was loaded again."""

    def fault(samples: list[Sample]) -> list[Sample]:
        kept = max((s.energy_joules or 0.0 for s in samples if s.t <= at), default=0.0)
        return _counter(samples, lambda t, j: j if t <= at else j - kept)

    return fault


def wrapped(at: float) -> Fault:
    """A counter of 32 bits reaches its end."""

    def fault(samples: list[Sample]) -> list[Sample]:
        reached = max((s.energy_joules or 0.0 for s in samples if s.t <= at), default=0.0)
        return _counter(samples, lambda _, j: (j - reached + WRAP_JOULES - 0.001) % WRAP_JOULES)

    return fault


def jumped(at: float, joules: float) -> Fault:
    """Joules that nobody drew come onto the counter, or go."""
    return lambda samples: _counter(samples, lambda t, j: j if t <= at else j + joules)


def without(*names: str, since: float = -math.inf) -> Fault:
    """The card does not offer these, or no more."""
    nothing = dict.fromkeys(names)
    return lambda samples: [replace(s, **nothing) if s.t >= since else s for s in samples]  # type: ignore[arg-type]


def silent(since: float) -> Fault:
    """The card does not answer at all any more."""
    return lambda samples: [sample for sample in samples if sample.t < since]


COUNTER, INSTANT, AVERAGE = "energy_joules", "instant_watts", "average_watts"

WATTS = st.floats(20, 700)
CONSTANT = st.builds(Constant, WATTS)
RAMP = st.builds(Ramp, WATTS, st.floats(0, 20))


def squares(shortest: float, longest: float, least_duty: float = 0.05) -> st.SearchStrategy[Square]:
    """Square waves with periods between these."""
    return st.builds(
        Square,
        low=st.floats(20, 300),
        highest=st.floats(300, 700),
        period=st.floats(shortest, longest),
        duty=st.floats(least_duty, 1 - least_duty),
        offset=st.floats(0, 1),
    )


def synthetic_cards(power: st.SearchStrategy[Power], gaps: float = 0.0) -> st.SearchStrategy[SyntheticCard]:
    """Cards with this power.

    Args:
        gaps: the longest time without a reading; at most two of them.
    """
    no_reading = st.lists(st.tuples(st.floats(0, 12), st.floats(0, gaps)), max_size=2 if gaps else 0)
    return st.builds(
        SyntheticCard,
        power=power,
        tick=st.floats(0.01, 0.2),
        tick_jitter=st.floats(0, 0.9),
        phase=st.floats(0, 1),
        read_jitter=st.floats(0, 0.9),
        gaps=no_reading.map(tuple),
        already=st.floats(0, 4e6),
        seed=st.integers(0, 1000),
    )


def step(number: int, seconds: float, real: int = 1000, t: float = 0.0) -> Step:
    """A step of plain rows."""
    return Step(
        t=t, step=number, seconds=seconds, loss=2.0, rows=2, slots=real, real=real, trained=real // 2, skipped=False
    )


def window_of(start: float, steps: Sequence[Step]) -> list[Event]:
    """What a worker says of a window of these steps, which lasts as long as they do."""
    end = start + sum(each.seconds or 0.0 for each in steps)
    return [WindowOpened(t=start, after_step=0), *steps, WindowClosed(t=end, after_step=len(steps))]


def job_of(
    steps: int, begun: float = 0.0, seconds: float = 0.1, every: int = 10, between: float = 0.2
) -> Iterator[Event]:
    """What the worker says of a job of two epochs whose loss falls from 3 to 2.

    Args:
        begun: when its first step began.
        seconds: of a step.
        every: steps after which it is evaluated, and a checkpoint is saved.
        between: seconds of an evaluation with its checkpoint.
    """
    t = begun
    yield Evaluated(t=t, phase=Phase.evaluation_before.value, loss=3.0, rows=4, tokens=99)
    yield JobPlanned(t=t, steps=steps, steps_per_epoch=steps // 2)
    yield PhaseBegan(t=t, phase=Phase.window.value)
    yield WindowOpened(t=t, after_step=0)
    for number in range(1, steps + 1):
        t += seconds
        yield replace(step(number, seconds, t=t), loss=3 - number / steps, learning_rate=1e-4)
        if number % every:
            continue
        yield WindowClosed(t=t, after_step=number)
        yield PhaseBegan(t=t, phase=Phase.evaluation.value)
        t += between / 2
        loss = 3 - number / steps
        yield Evaluated(t=t, phase=Phase.evaluation.value, loss=loss, rows=4, tokens=99, step=number)
        yield PhaseBegan(t=t, phase=Phase.checkpoint.value)
        t += between / 2
        folder = f"checkpoints/{number:06}"
        yield Checkpointed(t=t, step=number, folder=folder, total_bytes=2**20, epoch=2 * number / steps)
        yield PhaseBegan(t=t, phase=Phase.window.value)
        yield WindowOpened(t=t, after_step=number)
