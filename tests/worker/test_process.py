"""What a worker inherits from the server it is forked from, which sees no GPU."""

from types import SimpleNamespace

import pytest
from torch._dynamo.device_interface import CpuInterface, CudaInterface
from torch.utils import _triton

from lora_lab.worker.process import forget_hidden_gpus


def test_what_a_library_asked_while_the_gpus_were_hidden_is_asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao asks for Triton while it is imported; torch remembers the answer, and would compile nothing."""
    monkeypatch.setattr(_triton, "has_triton_package", lambda: True)
    monkeypatch.setattr(CpuInterface, "is_available", staticmethod(lambda: False))  # else it looks into Triton
    monkeypatch.setattr(CudaInterface, "is_available", staticmethod(lambda: False))
    _triton.has_triton.cache_clear()
    try:
        assert not _triton.has_triton()
        monkeypatch.setattr(CudaInterface, "is_available", staticmethod(lambda: True))
        hopper = staticmethod(lambda *_: SimpleNamespace(major=9))
        monkeypatch.setattr(CudaInterface.Worker, "get_device_properties", hopper)
        assert not _triton.has_triton(), "remembered: else there is nothing to forget"
        forget_hidden_gpus()
        assert _triton.has_triton()
    finally:
        _triton.has_triton.cache_clear()
