"""Read the sensors at a steady rate from a thread of the parent, while the worker trains."""

import json
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import overload

from lora_lab.reading import parsed, typed

RATE_HZ = 20.0
"""Samples of energy and power per second: two per tick of a counter that moves every 100 ms."""

LONG_AFTER_SECONDS = 600.0
LONG_RATE_HZ = 2.0
"""The rate of a job from ten minutes on. A counter loses no energy by it, but sharp edges: where a stretch begins and
ends is known to half a second instead of a tenth."""

RECENT = 5000
"""As many samples of a job are kept in memory: 40 minutes at the lower rate."""

SLOW_EVERY = 5
"""Memory, processes, temperature, clocks and slowdowns are read with every fifth sample: four times a second."""

BUSY_SHARE = 0.25
"""The largest share of one CPU core that sampling may take. Where calls take longer, there are fewer."""

JITTER = 0.2
"""The largest deviation of an interval between two samples from the usual one, as a share of it."""

_FAULTS_IN_A_ROW = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One reading of the sensors. None where the machine lacks a sensor, or it was not its turn."""

    t: float
    """time.monotonic() seconds, midway through the reading."""
    card: int = 0
    """Which card of the trial's, from 0."""
    energy_joules: float | None = None
    """The card's running counter."""
    instant_watts: float | None = None
    average_watts: float | None = None
    """The driver's mean over the previous second."""
    cpu_joules: float | None = None
    """The running counters of all CPU packages together (RAPL)."""
    used_bytes: int | None = None
    """Device memory in use by everybody."""
    processes: tuple[tuple[int, int | None], ...] | None = None
    """Pid and device memory in bytes of each process that computes on the card."""
    temperature_celsius: float | None = None
    sm_mhz: float | None = None
    memory_mhz: float | None = None
    slowdowns: int | None = None
    """NVML's bit mask of the reasons why the clocks are lower than they could be."""
    power_cap_seconds: float | None = None
    """Running counter: clocks held down by the power limit."""
    thermal_seconds: float | None = None
    """Running counter: clocks held down by heat."""
    brake_seconds: float | None = None
    """Running counter: clocks held down by a signal from outside, of a power supply for example."""

    def encode(self) -> str:
        """Return one line of JSON without what was not read; the first card's number goes without saying."""
        said = {name: value for name, value in asdict(self).items() if value is not None}
        if self.card == 0:
            del said["card"]
        return json.dumps(said)

    @classmethod
    def decode(cls, line: str | bytes) -> "Sample":
        """Read a sample from the line that `encode` made.

        Raises: Damaged."""
        return typed(cls, parsed(line))


class Recent(Sequence[Sample]):
    """The newest samples, of a sampler that runs for hours. It never gets shorter, so that another thread may look
    through it at any time."""

    def __init__(self, most: int = RECENT) -> None:
        self._samples: deque[Sample] = deque(maxlen=most)

    def extend(self, samples: Iterable[Sample]) -> None:
        """Add samples; the oldest make room."""
        self._samples.extend(samples)

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, place: int) -> Sample: ...

    @overload
    def __getitem__(self, place: slice) -> list[Sample]: ...

    def __getitem__(self, place: int | slice) -> Sample | list[Sample]:
        return list(self._samples.copy())[place] if isinstance(place, slice) else self._samples[place]


class SensorFailed(RuntimeError):
    """A sensor did not answer."""


class Sampler:
    """Collect samples between `with` and its end. Never raises into the trial: a sensor that keeps failing
    ends the sampling, and `fault` says why; it is None again when the sensor has recovered."""

    def __init__(
        self,
        read: Callable[[bool], Sequence[Sample]] | None,
        keep: Callable[[Sample], None] = lambda _: None,
        rate_hz: float = RATE_HZ,
        recent: int | None = None,
    ) -> None:
        """Get ready.

        Args:
            read: takes one sample per card, of the slow sensors too when its argument is True; None without sensors.
            keep: called with each sample at once, from the sampler's thread.
            recent: keep only as many of the newest samples in memory, and lower the rate from ten minutes on.
        """
        self._read = read
        self._keep = keep
        self._rate_hz = rate_hz
        self._is_long = recent is not None
        self._stop = threading.Event()
        self._paused = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="sampler")
        self.samples: list[Sample] | Recent = [] if recent is None else Recent(recent)
        self.taken = 0
        """How many samples there were."""
        self.fault: str | None = None
        self.cpu_seconds = 0.0
        """CPU time that the samples have taken."""
        self.seconds = 0.0
        """Time over which they were taken."""

    def __enter__(self) -> "Sampler":
        if self._read is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def pause(self, paused: bool) -> None:
        """Stop sampling for a while, or go on. This is how the cost of sampling is measured."""
        self._paused.set() if paused else self._paused.clear()

    def _run(self) -> None:
        assert self._read is not None
        faults, readings = 0, 0
        began = due = time.monotonic()
        while not self._stop.is_set():
            cost = 0.0
            if not self._paused.is_set():
                cpu = time.thread_time()
                try:
                    samples = self._read(readings % SLOW_EVERY == 0)
                    if self._stop.is_set():
                        return  # a driver can hang for longer than anybody waits; the trial's files are closed by now
                    self.samples.extend(samples)
                    self.taken += len(samples)
                    for sample in samples:
                        self._keep(sample)
                    faults = 0
                    self.fault = None
                except SensorFailed as error:
                    faults += 1
                    self.fault = str(error)
                    if faults >= _FAULTS_IN_A_ROW:
                        return
                readings += 1
                cost = time.thread_time() - cpu
                self.cpu_seconds += cost
            now = time.monotonic()
            self.seconds = now - began
            # not quite evenly: a load that swings in step with the readings would show one side of it alone
            rate_hz = LONG_RATE_HZ if self._is_long and self.seconds > LONG_AFTER_SECONDS else self._rate_hz
            interval = random.uniform(1 - JITTER, 1 + JITTER) / rate_hz
            due = max(due + interval, now + cost * (1 / BUSY_SHARE - 1))
            self._stop.wait(due - now)
