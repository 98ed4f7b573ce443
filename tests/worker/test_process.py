"""What a worker inherits from the server it is forked from, which sees no GPU; and what it says when the card fails."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.device_interface import CpuInterface, CudaInterface
from torch.utils import _triton

from lora_lab.config import TrialConfig
from lora_lab.events import Ended, Event
from lora_lab.method_config import OptimizerConfig
from lora_lab.worker import trial
from lora_lab.worker.process import forget_hidden_gpus
from lora_lab.worker.stages.stage import Stage


def test_what_a_library_asked_while_the_gpus_were_hidden_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
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


def break_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_stats", dict)
    monkeypatch.setattr(torch.cuda, "mem_get_info", fails)


def test_a_context_that_breaks_at_the_very_end_is_no_finished_trial(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    breaks = Stage(None, lambda _: break_the_card(monkeypatch))
    monkeypatch.setattr(trial, "STAGES", (trial.STAGES[0], breaks))
    said: list[Event] = []
    trial.run_trial(
        TrialConfig(optimizer=OptimizerConfig(optim="adamw_torch_fused"), share_device=True), tmp_path, said.append
    )
    last = said[-1]
    assert isinstance(last, Ended)
    assert (last.outcome, last.reason) == ("failed", "RuntimeError: CUDA error: device-side assert triggered")


def test_a_context_that_answers_nothing_does_not_hide_what_happened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """After a device-side assert, asking for free memory fails as well."""
    said: list[Event] = []

    def emit(event: Event) -> None:
        said.append(event)
        if len(said) == 1:
            break_the_card(monkeypatch)
            raise RuntimeError("CUDA error: an illegal memory access, first")

    trial.run_trial(TrialConfig(), tmp_path, emit)
    last = said[-1]
    assert isinstance(last, Ended)
    assert (last.outcome, last.reason) == ("failed", "RuntimeError: CUDA error: an illegal memory access, first")
