"""Measure how long the GPU itself works on a step, by torch's profiler after the window."""

import time
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch._C._autograd import DeviceType

from lora_lab.events import Profiled

_TOP = 40
"""Kernels that are reported by name."""


class StepProfiler:
    """Profiles some steps. It slows the host down and lengthens no kernel, so it measures the GPU's work alone.

    A profiler that fails (a driver without CUPTI, say) costs its own figure and nothing else: `fault` says why.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.fault = ""
        self._done = 0
        self._slots = 0
        self._ends: list[int] = []
        """When each step's work was done, in ns since the epoch, which is the profiler's clock, too."""
        self._profiler: torch.profiler.profile | None = None

    def start(self) -> None:
        """Profile the steps that follow. The device must be idle."""
        try:
            self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profiler.start()
        except RuntimeError as error:
            self._profiler, self.fault = None, str(error)

    def stepped(self, slots: int) -> Profiled | None:
        """Call after each profiled step with its token slots. Return the profile after the last one, else None."""
        self._done += 1
        self._slots += slots
        if self._profiler is None:
            return None
        torch.cuda.synchronize()
        self._ends.append(time.time_ns())
        if self._done < self.steps:
            return None
        try:
            self._profiler.stop()
            events = self._profiler.events() or ()
            began_ns = _began_ns(self._profiler)
        except RuntimeError as error:
            self._profiler, self.fault = None, str(error)
            return None
        on_gpu = [e for e in events if e.device_type == DeviceType.CUDA]
        spans = [(e.time_range.start, e.time_range.end) for e in on_gpu]
        counts: Counter[str] = Counter(e.name for e in on_gpu)
        seconds: Counter[str] = Counter()
        for e in on_gpu:
            seconds[e.name] += (e.time_range.end - e.time_range.start) / 1e6
        self._profiler = None
        return Profiled(
            t=time.monotonic(),
            steps=self._done,
            slots=self._slots,
            kernels=len(spans),
            busy_seconds=covered(spans) / 1e6,  # the profiler counts in microseconds
            busy_seconds_each=busy_of_steps(spans, [(end - began_ns) / 1e3 for end in self._ends]),
            kernel_seconds=sum(seconds.values()),
            top=[[name, counts[name], took] for name, took in seconds.most_common(_TOP)],
        )


def _began_ns(profiler: torch.profiler.profile) -> int:
    """Return the instant that the profiler counts from, in ns since the epoch."""
    results = profiler.profiler.kineto_results if profiler.profiler else None
    return results.trace_start_ns() if results else 0


def busy_of_steps(spans: Sequence[tuple[float, float]], ends: Sequence[float]) -> list[float]:
    """Return the seconds that each step was busy, of spans and of the steps' ends in microseconds.

    The device was idle at each end. So a span that crosses one, or lies after the last, or a step without any means
    that the two clocks disagree: then nothing is returned."""
    starts = [float("-inf"), *ends[:-1]]
    steps = [
        [(start, stop) for start, stop in spans if begin <= start and stop <= end]
        for begin, end in zip(starts, ends, strict=True)
    ]
    if not all(steps) or sum(map(len, steps)) != len(spans):
        return []
    return [covered(step) / 1e6 for step in steps]


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of spans: kernels of several streams can run at the same time."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
