"""Where a running job is: how far, how well, how fast, how long it still takes, and what it has drawn."""

import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice

from lora_lab.events import Evaluated, Event, PhaseBegan, Step
from lora_lab.job_events import Checkpointed, JobPlanned, Resumed, Spiked
from lora_lab.options import OnSpike
from lora_lab.phase import Phase
from lora_lab.telemetry.sampler import SLOW_EVERY, Sample
from lora_lab.trial.standing import clock

_RECENT_STEPS = 100
"""The rate is that of this many steps: it follows a clock that falls, and a long row does not move it."""

_SMOOTHED_STEPS = 10
"""The loss shown is the mean of the last steps."""

_JOULES_PER_KWH = 3.6e6

_NEWEST = 2000
"""Samples that are looked through for new ones: more than there are between two events of a job, nearly always."""

_LONGEST_GAP_SECONDS = 60.0
"""Power is not carried over a longer time without a reading."""


class JobProgress:
    """A job as its events and the sensors have described it so far."""

    def __init__(self, samples: Sequence[Sample], price_per_kwh: float | None) -> None:
        """Begin before the job does.

        Args:
            samples: the readings of the sensors so far; the sampler goes on adding to them.
        """
        self._price = price_per_kwh
        self._drawn = _Drawn(samples)
        self._samples = samples
        self.planned: JobPlanned | None = None
        """None for a trial that is not a job, and before a job's length is known."""
        self.step = 0
        """The last step that counts."""
        self._recent: deque[Step] = deque(maxlen=_RECENT_STEPS)
        self._before: Evaluated | None = None
        self._evaluated: list[Evaluated] = []
        self._went_on = False
        """Whether an earlier start evaluated, too; what it found is not known here."""
        self._phase = ("", 0.0)
        self._stepping_seconds = 0.0
        self._between_seconds = 0.0
        """Time of evaluations and checkpoints."""

    def see(self, event: Event) -> None:
        """Take in one event."""
        if isinstance(event, JobPlanned):
            self.planned = event
        elif isinstance(event, PhaseBegan):
            self._see_phase(event)
        elif isinstance(event, Step):
            self.step = event.step
            self._recent.append(event)
        elif isinstance(event, Resumed):
            self._went_on |= self.step == 0 < event.step
            self.step = event.step
            self._recent.clear()
            self._evaluated = [each for each in self._evaluated if (each.step or 0) <= event.step]
        elif isinstance(event, Evaluated) and event.phase == Phase.evaluation_before.value:
            self._before = event
        elif isinstance(event, Evaluated) and event.step is not None:
            self._evaluated.append(event)
        if self.planned is not None:
            self._drawn.look(self.planned.t)

    def _see_phase(self, event: PhaseBegan) -> None:
        phase, since = self._phase
        if phase in (Phase.warm_up.value, Phase.window.value):
            self._stepping_seconds += event.t - since
        elif phase in (Phase.evaluation.value, Phase.checkpoint.value):
            self._between_seconds += event.t - since
        self._phase = (event.phase, event.t)

    @property
    def place(self) -> str:
        """Return the step and the epoch."""
        if self.planned is None:
            return f"step {self.step:,}"
        epochs = self.planned.steps / self.planned.steps_per_epoch
        return f"step {self.step:,}/{self.planned.steps:,}  epoch {self._epoch(self.step):.2f}/{epochs:.4g}"

    def _epoch(self, step: int) -> float:
        return 0.0 if self.planned is None else step / self.planned.steps_per_epoch

    @property
    def seconds_left(self) -> float | None:
        """Return the time until the last step: the remaining steps at the present rate, and for evaluations and
        checkpoints the same share as so far. None before the first step with a time."""
        timed = self._timed()
        if self.planned is None or not timed:
            return None
        seconds = statistics.fmean(step.seconds or 0.0 for step in timed)
        share = self._between_seconds / self._stepping_seconds if self._stepping_seconds else 0.0
        return (self.planned.steps - self.step) * seconds * (1 + share)

    @property
    def left(self) -> str:
        """Return the time left as text; empty while it is not known."""
        seconds = self.seconds_left
        return "" if seconds is None else f"{clock(seconds)} left"

    def figures(self) -> list[str]:
        """Return losses, speed, power and energy, as far as they are known, each with its unit."""
        return list(self._figures())

    def _figures(self) -> Iterator[str]:
        if self._recent:
            loss = statistics.fmean(step.loss for step in islice(reversed(self._recent), _SMOOTHED_STEPS))
            yield f"loss {loss:.3f}"
        if self._evaluated:
            yield f"held-out {self._evaluated[-1].loss:.4f}"
        elif self._before is not None:
            yield f"held-out {self._before.loss:.4f} before"
        timed = self._timed()
        if timed:
            rate = sum(step.real for step in timed) / sum(step.seconds or 0.0 for step in timed)
            yield f"{rate:,.0f} tokens/s"
        watts = newest_watts(self._samples)
        if watts is not None:
            yield f"{watts:.0f} W"
        joules = self._drawn.joules
        if joules is not None:
            yield f"{joules / _JOULES_PER_KWH:.3f} kWh"
            if self._price is not None:
                yield f"cost {joules / _JOULES_PER_KWH * self._price:.2f}"

    def _timed(self) -> list[Step]:
        return [step for step in self._recent if step.seconds]

    def told(self, event: Event) -> str:
        """Return a sentence about an event that a user wants to know of; empty for all others."""
        if isinstance(event, Evaluated) and event.step is not None:
            return self._told_evaluated(event)
        if isinstance(event, Checkpointed):
            size = event.total_bytes / 2**20
            return f"checkpoint after step {event.step:,}: {event.folder}, {size:,.1f} MiB"
        if isinstance(event, Resumed):
            where = f"the checkpoint {event.folder}" if event.folder else "the start"
            return f"continues from step {event.step:,}, {where}"
        if isinstance(event, Spiked):
            then = "the job stops"
            if event.action == OnSpike.lower_lr.value:
                then = f"back to a checkpoint, with a learning rate of {event.learning_rate:g}"
            rows = f" (training rows {', '.join(map(str, event.rows[:8]))}{', ...' if event.rows[8:] else ''})"
            return f"loss spike at step {event.step:,}: {event.reason}{rows if event.rows else ''}; {then}"
        return ""

    def _told_evaluated(self, event: Evaluated) -> str:
        others = [each.loss for each in self._evaluated if each is not event]
        others += [] if self._before is None else [self._before.loss]
        lowest = min(others, default=math.inf)
        since = "since it went on" if self._went_on else "so far"
        remarks = [f"the lowest {since}" if event.loss < lowest else f"lowest {since} {lowest:.4f}"]
        remarks += [] if self._before is None else [f"{self._before.loss:.4f} before training"]
        return (
            f"held-out loss {event.loss:.4f} after step {event.step:,}, epoch {self._epoch(event.step or 0):.2f} "
            f"({', '.join(remarks)})"
        )


def newest_watts(samples: Sequence[Sample]) -> float | None:
    """Return the card's power by the newest readings; None where they have none."""
    last = samples[: -SLOW_EVERY - 1 : -1]
    return next((sample.average_watts for sample in last if sample.average_watts is not None), None)


class _Drawn:
    """The energy of the card since a moment: its counter where it has one, else its power over time. This is for the
    eye; the record's figure is calculated in telemetry/."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples
        self._last: Sample | None = None
        self.joules: float | None = None
        """None without a sensor."""

    def look(self, since: float) -> None:
        """Add what was drawn since the last look, or since this moment at the first."""
        for sample in self._samples[-_NEWEST:]:
            is_new = sample.t >= since if self._last is None else sample.t > self._last.t
            has_power = sample.energy_joules is not None or sample.average_watts is not None
            if is_new and has_power and not sample.card:
                self._add(sample)

    def _add(self, sample: Sample) -> None:
        last, self._last = self._last, sample
        drawn = 0.0
        if last is None:
            pass
        elif sample.energy_joules is not None and last.energy_joules is not None:
            # a counter that began again has lost what was on it
            drawn = max(0.0, sample.energy_joules - last.energy_joules)
        elif sample.average_watts is not None and sample.t - last.t <= _LONGEST_GAP_SECONDS:
            drawn = sample.average_watts * (sample.t - last.t)
        self.joules = (self.joules or 0.0) + drawn
