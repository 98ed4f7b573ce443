"""Make a large card refuse what a smaller one would."""

import torch


class VramLimit:
    """Caps torch's allocator so that the whole process stays within `limit_gib` of device memory.

    What torch does not allocate itself (the CUDA context, libraries' kernels, bitsandbytes' managed pages) grows
    while a trial warms up; the cap is the limit less what that has grown to when `apply` is called. The parent
    checks the outcome against the card's own reading. A real small card would move managed pages to the host
    before it refused; here they count.
    """

    def __init__(self, limit_gib: float | None, device: torch.device) -> None:
        self._limit_bytes = None if limit_gib is None else limit_gib * 2**30
        self._device = device

    def apply(self) -> None:
        """Cap the allocator at what is left of the limit now. Does nothing without a limit."""
        if self._limit_bytes is None:
            return
        torch.cuda.init()
        free, total = torch.cuda.mem_get_info(self._device)
        rest = total - free - torch.cuda.memory_reserved(self._device)
        torch.cuda.set_per_process_memory_fraction(max(0.0, self._limit_bytes - rest) / total, self._device)
