"""Measure how long the GPU itself works on a step, by torch's profiler after the window."""

import time
from collections import Counter
from collections.abc import Iterable

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
        if self._done < self.steps or self._profiler is None:
            return None
        torch.cuda.synchronize()
        try:
            self._profiler.stop()
            events = self._profiler.events() or ()
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
            kernel_seconds=sum(seconds.values()),
            top=[[name, counts[name], took] for name, took in seconds.most_common(_TOP)],
        )


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of spans: kernels of several streams can run at the same time."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
