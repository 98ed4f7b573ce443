"""Find the attention kernel that really runs, in the operations of one training forward."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_KERNELS = {
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_flash_attention_for_cpu": "flash_cpu",
    "_scaled_dot_product_efficient_attention": "memory_efficient",
    "_scaled_dot_product_cudnn_attention": "cudnn",
}


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.softmax = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in _KERNELS:
            self.seen.add(_KERNELS[name])
        self.softmax |= name in ("_softmax", "_safe_softmax")
        return func(*args, **(kwargs or {}))


class AttentionKernels:
    """Watches the first training forward and none after it, so that the window is not disturbed."""

    def __init__(self) -> None:
        self._recorder: _Recorder | None = None
        self.seen: frozenset[str] | None = None
        """Kernel names: flash, memory_efficient, cudnn, math (separate softmax and products). None before a forward."""

    def watch_one(self) -> None:
        """Begin to watch, if no forward has been watched."""
        if self.seen is None and torch.is_grad_enabled():
            self._recorder = _Recorder()
            self._recorder.__enter__()

    def over(self) -> None:
        """End the watch."""
        if self._recorder is None:
            return
        self._recorder.__exit__(None, None, None)
        seen = self._recorder.seen
        # transformers' own eager attention and torch's math path both show as a softmax
        self.seen = frozenset(seen or ({"math"} if self._recorder.softmax else set()))
        self._recorder = None


def kernels_of(run: Callable[[], object]) -> frozenset[str]:
    """Return the attention kernels that `run` calls, by the same names. torch's profiler sees them in compiled code
    too; a dispatch mode would keep torch from compiling."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        run()
    names = {event.name.removeprefix("aten::") for event in profiled.events() or ()}
    fused = {_KERNELS[name] for name in names & _KERNELS.keys()}
    # torch's math path and transformers' own eager attention, compiled, are products like all others
    return frozenset(fused or {"math"})
