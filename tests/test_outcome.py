"""How an error becomes one of the ends, and ends an exit code."""

import itertools

import pytest
import torch

from lora_lab.config import RefusedInput
from lora_lab.outcome import Diverged, Outcome, Unsupported, combined_exit_code, end_of


def caught(error: BaseException) -> BaseException:
    """With a traceback, as it comes out of a trial."""
    try:
        raise error
    except BaseException as raised:
        return raised


class OutOfMemoryError(RuntimeError):
    """torch.cuda's, by name: the parent has no torch to compare types with."""


def test_an_allocation_that_really_fails_on_the_cpu_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as info:
        torch.empty(2**50)
    assert end_of(info.value).outcome is Outcome.out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ..."),
        OutOfMemoryError("Allocation on device 0 would exceed allowed memory."),
        MemoryError(),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported ..."),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory: ..."),
    ],
)
def test_out_of_memory_is_known_by_type_and_by_text(error: BaseException) -> None:
    end = end_of(caught(error))
    assert end.outcome is Outcome.out_of_memory
    assert end.reason
    assert "\n" not in end.reason


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("The size of tensor a (2) must match the size of tensor b (3)"),
        ValueError("CUDA out of memory is what I call my data set"),
        OSError("No space left on device"),
        KeyError("loss"),
        RuntimeError(),
        RuntimeError("\n \n"),
    ],
)
def test_anything_else_has_failed_and_keeps_its_traceback(error: BaseException) -> None:
    end = end_of(caught(error))
    assert end.outcome is Outcome.failed
    assert end.reason.startswith(type(error).__name__)
    assert end.traceback is not None
    assert "in caught" in end.traceback


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (RefusedInput("no row is left"), Outcome.refused),
        (Unsupported("bf16 needs Ampere"), Outcome.unsupported),
        (Diverged("the training loss was nan at step 7"), Outcome.diverged),
    ],
)
def test_our_own_errors_keep_their_whole_message(error: Exception, outcome: Outcome) -> None:
    end = end_of(caught(error))
    assert (end.outcome, end.reason) == (outcome, str(error))


def test_exit_codes_are_those_of_the_readme() -> None:
    codes = {outcome.name: outcome.exit_code for outcome in Outcome}
    assert codes == {
        "finished": 0,
        "out_of_memory": 3,
        "diverged": 3,
        "unsupported": 3,
        "timed_out": 1,
        "killed": 1,
        "failed": 1,
        "refused": 2,
    }


def test_a_sweep_leaves_with_the_worst_that_happened_in_any_order() -> None:
    worst_first = [130, 1, 2, 0, 3]  # one finished trial makes a sweep with out-of-memory corners a success
    for size in (1, 2, 3):
        for codes in itertools.product(worst_first, repeat=size):
            assert combined_exit_code(list(codes)) == min(codes, key=worst_first.index)
