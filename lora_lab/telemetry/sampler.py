"""Reads a card at a steady rate from a thread of the parent, while the worker trains."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

RATE_HZ = 10.0
"""One reading is several NVML calls of up to 4 ms each; the energy counter moves every 100 ms."""

_FAULTS_IN_A_ROW = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One reading. None where the card does not offer it."""

    t: float
    """time.monotonic() seconds, midway through the reading."""
    energy_joules: float | None
    """The card's running counter."""
    power_watts: float | None
    used_bytes: int | None
    """Device memory in use by everybody."""
    temperature_celsius: float | None


class SensorFailed(RuntimeError):
    """A sensor did not answer."""


class Sampler:
    """Collects samples between `with` and its end. Never raises into the trial: a sensor that keeps failing
    ends the sampling, and `fault` says why; it is None again when the sensor has recovered."""

    def __init__(
        self,
        read: Callable[[], Sample] | None,
        keep: Callable[[Sample], None] = lambda _: None,
        rate_hz: float = RATE_HZ,
    ) -> None:
        """Get ready.

        Args:
            read: one reading; None where there is no card.
            keep: told each sample at once, from the sampler's thread.
        """
        self._read = read
        self._keep = keep
        self._interval = 1.0 / rate_hz
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="sampler")
        self.samples: list[Sample] = []
        self.fault: str | None = None

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

    def _run(self) -> None:
        assert self._read is not None
        faults = 0
        due = time.monotonic()
        while not self._stop.is_set():
            try:
                sample = self._read()
                if self._stop.is_set():
                    return  # a driver can hang for longer than anybody waits; the trial's files are closed by now
                self.samples.append(sample)
                self._keep(sample)
                faults = 0
                self.fault = None
            except SensorFailed as error:
                faults += 1
                self.fault = str(error)
                if faults >= _FAULTS_IN_A_ROW:
                    return
            due = max(due + self._interval, time.monotonic())
            self._stop.wait(due - time.monotonic())
