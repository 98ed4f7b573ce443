"""Define how a trial can end, and turn an error into one of these ends."""

import re
import traceback
from dataclasses import dataclass
from enum import Enum

from lora_lab.config import InvalidInput
from lora_lab.events import Ended
from lora_lab.secrets import without_secrets

EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130


class Outcome(Enum):
    """The ways in which a trial can end. Every trial ends in exactly one of them."""

    finished = "finished"
    out_of_memory = "out_of_memory"
    predicted_out_of_memory = "predicted_out_of_memory"
    """It was not run, because it certainly needs more memory than there is: plan=fits. Nothing was measured."""
    diverged = "diverged"
    unsupported = "unsupported"
    timed_out = "timed_out"
    killed = "killed"
    failed = "failed"
    refused = "refused"
    """The worker found invalid input, before any weights were loaded."""

    @property
    def exit_code(self) -> int:
        """Return 0 for finished, 3 for measured or predicted but not finished, 2 for invalid input, 1 for anything
        else."""
        if self is Outcome.finished:
            return 0
        predicted = Outcome.predicted_out_of_memory
        if self in (Outcome.out_of_memory, predicted, Outcome.diverged, Outcome.unsupported):
            return 3
        return EXIT_REFUSED if self is Outcome.refused else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """An outcome and the reason for it."""

    outcome: Outcome
    reason: str
    traceback: str | None = None
    step: int | None = None
    """The optimizer step at which the cause began, where that is not the step after the last."""
    asked_bytes: int | None = None
    """The size of the allocation that failed, where the allocator reported it."""


class Diverged(RuntimeError):
    """A training loss that is not finite, or has risen beyond measure.loss_spike."""

    def __init__(self, text: str, step: int) -> None:
        super().__init__(text)
        self.step = step


class Unsupported(RuntimeError):
    """A request that this machine cannot fulfil; another one could."""


def end_of(error: BaseException) -> End:
    """Turn the error that stopped a trial into its end. Errors are recognised by name, so that torch is not needed."""
    text = without_secrets(str(error)).strip() or type(error).__name__
    if isinstance(error, InvalidInput):
        return End(outcome=Outcome.refused, reason=text)
    if isinstance(error, Unsupported):
        return End(outcome=Outcome.unsupported, reason=text)
    if isinstance(error, Diverged):
        return End(outcome=Outcome.diverged, reason=text, step=error.step)
    # an error that is raised while another is handled may hide it
    for told in (error, error.__cause__, error.__context__):
        if told is not None and _is_out_of_memory(told, str(told)):
            return out_of_memory(without_secrets(str(told)).strip() or type(told).__name__)
    trace = without_secrets("".join(traceback.format_exception(error)))
    return End(outcome=Outcome.failed, reason=f"{type(error).__name__}: {text.splitlines()[0]}", traceback=trace)


def end_said(said: Ended) -> End:
    """Turn a worker's last event into an end."""
    return End(
        outcome=Outcome(said.outcome),
        reason=said.reason,
        traceback=said.traceback,
        step=said.step,
        asked_bytes=said.asked_bytes,
    )


def out_of_memory(text: str) -> End:
    """Turn an allocator's error into an end; its advice on environment variables is left out."""
    reason = text.splitlines()[0].partition(" If reserved but unallocated")[0]
    return End(outcome=Outcome.out_of_memory, reason=reason, asked_bytes=_asked_bytes(text))


def _asked_bytes(text: str) -> int | None:
    """Return the bytes that torch or numpy tried to allocate."""
    said = re.search(r"(?:tried|unable) to allocate (\d{1,18}(?:\.\d*)?) (bytes|[KMGTPE]iB)", text, re.IGNORECASE)
    if not said:
        return None
    power = " KMGTPE".index(said[2][0].upper()) if len(said[2]) == 3 else 0
    return round(float(said[1]) * 1024.0**power)


def _is_out_of_memory(error: BaseException, text: str) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # torch's CPU allocator, the CUDA driver and bitsandbytes' managed allocator each raise a plain RuntimeError
    return isinstance(error, RuntimeError) and says_out_of_memory(text)


def says_out_of_memory(text: str) -> bool:
    """Return whether an error message or the end of a log reports out of memory."""
    said = (
        "out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
        "can't allocate memory",
        "memory allocation of",  # Rust's, before it aborts
    )
    return any(words in text for words in said)


def combined_exit_code(codes: list[int]) -> int:
    """Return one exit code for several trials: 0 when all were measured and at least one finished, 1 when
    any failed, timed out or was killed, 2 when any was refused, 3 when none finished."""
    for decisive in (EXIT_INTERRUPTED, 1, EXIT_REFUSED):
        if decisive in codes:
            return decisive
    return 0 if 0 in codes else 3
