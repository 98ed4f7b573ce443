"""How an error becomes one of the ends, and ends an exit code."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.config import InvalidInput
from lora_lab.events import Ended
from lora_lab.outcome import Diverged, Outcome, Unsupported, combined_exit_code, end_of, end_said


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


def test_out_of_memory_is_known_beneath_what_its_handling_raised() -> None:
    """A CUDA graph's recording that runs out of memory ends with an error of its own."""
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
    except RuntimeError as error:
        end = end_of(error)
    assert end.outcome is Outcome.out_of_memory
    assert end.asked_bytes == 2 * 2**30


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
        (InvalidInput("no row is left"), Outcome.refused),
        (Unsupported("bf16 needs Ampere"), Outcome.unsupported),
        (Diverged("the training loss was nan at step 7", 7), Outcome.diverged),
    ],
)
def test_our_own_errors_keep_their_whole_message(error: Exception, outcome: Outcome) -> None:
    end = end_of(caught(error))
    assert (end.outcome, end.reason) == (outcome, str(error))
    assert end.step == getattr(error, "step", None), "where it began, which is not where it was noticed"


CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.19 GiB of which 5.06 MiB is "
    "free. Including non-PyTorch memory, this process has 79.18 GiB memory in use. Of the allocated memory 78.03 GiB "
    "is allocated by PyTorch, and 670.58 MiB is reserved by PyTorch but unallocated. If reserved but unallocated "
    "memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See "
    "documentation for Memory Management  (https://docs.pytorch.org/docs/stable/notes/cuda.html)"
)
CAPPED_CUDA_SAYS = CUDA_SAYS.replace("free. Including", "free. 8.00 GiB allowed; Including")
CPU_SAYS = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
NUMPY_SAYS = "Unable to allocate {} for an array with shape (1000000000000,) and data type float64"


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError(CUDA_SAYS), 20 * 2**20),
        (torch.OutOfMemoryError(CAPPED_CUDA_SAYS), 20 * 2**20),
        (torch.OutOfMemoryError(CUDA_SAYS.replace("20.00 MiB", "37.25 GiB")), round(37.25 * 2**30)),
        (torch.OutOfMemoryError(CUDA_SAYS.replace("20.00 MiB", "512 bytes")), 512),
        (torch.OutOfMemoryError(CUDA_SAYS.replace("20.00 MiB", "2.00 KiB")), 2048),
        (RuntimeError(CPU_SAYS), 4_000_000_000_000),
        (MemoryError(NUMPY_SAYS.format("7.28 TiB")), round(7.28 * 2**40)),
        (MemoryError(NUMPY_SAYS.format("128. TiB")), 2**47),
        (MemoryError(NUMPY_SAYS.format("8.00 PiB")), 2**53),
        (MemoryError(), None),
        (RuntimeError("CUDA error: out of memory"), None),
    ],
)
def test_how_much_was_asked_for_is_read_out_of_the_allocators_words(error: BaseException, asked: int | None) -> None:
    end = end_of(caught(error))
    assert (end.outcome, end.asked_bytes) == (Outcome.out_of_memory, asked)


def test_advice_on_torchs_settings_is_left_out_of_the_reason() -> None:
    assert end_of(torch.OutOfMemoryError(CUDA_SAYS)).reason.endswith("is reserved by PyTorch but unallocated.")


def test_the_libraries_of_today_say_how_much_was_asked_for() -> None:
    with pytest.raises(RuntimeError) as by_torch:
        torch.empty(2**50, dtype=torch.uint8)
    assert end_of(by_torch.value).asked_bytes == 2**50
    with pytest.raises(MemoryError) as by_numpy:
        np.empty(2**47, np.uint8)  # the whole address space of a process
    assert end_of(by_numpy.value).asked_bytes == 2**47


@given(
    st.from_regex(
        r"CUDA out of memory\. ([Tt]ried|Unable) to allocate [\d.]+ ([Bb]ytes|[KMGTPEkm]i[Bb])", fullmatch=True
    )
)
def test_no_allocators_words_break_the_ending(text: str) -> None:
    """It is the worker's last word: an error in it would leave the trial without an outcome."""
    assert end_of(RuntimeError(text)).outcome is Outcome.out_of_memory


@given(
    st.builds(
        Ended,
        t=st.just(1.0),
        outcome=st.sampled_from([outcome.value for outcome in Outcome]),
        reason=st.text(),
        traceback=st.none() | st.text(),
        step=st.none() | st.integers(0),
        asked_bytes=st.none() | st.integers(0),
    )
)
def test_a_workers_last_word_is_taken_at_its_word(said: Ended) -> None:
    end = end_said(said)
    taken = (end.outcome.value, end.reason, end.traceback, end.step, end.asked_bytes)
    assert taken == (said.outcome, said.reason, said.traceback, said.step, said.asked_bytes)


def test_exit_codes_are_those_of_the_readme() -> None:
    codes = {outcome.name: outcome.exit_code for outcome in Outcome}
    assert codes == {
        "finished": 0,
        "out_of_memory": 3,
        "predicted_out_of_memory": 3,
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
