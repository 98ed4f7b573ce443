"""Replay a tape through torch's caching allocator, for the memory that it takes from the driver."""

from collections.abc import Callable, Sequence

from lora_lab.fit.allocator import Allocator
from lora_lab.fit.expandable import ExpandableAllocator
from lora_lab.fit.fixed import FixedAllocator
from lora_lab.fit.tape import Tape


def replay(tape: Tape, limit: int | None = None, times: int = 2) -> int:
    """Replay loading, and steps after it; return the most that is reserved during the steps.

    Args:
        tape: of a whole trial.
        limit: of what may be reserved, in bytes.
        times: steps, where they are not recorded. What the first leaves behind is used by the second.

    Raises: OutOfMemory beyond the limit."""
    allocator = _kind(tape)
    loading = allocator(limit)
    held: dict[int, Callable[[], None]] = {}
    _run(loading, held, tape.events[: tape.loaded])
    if tape.returns_cached:
        loading.return_cached()
    loading.most_reserved = loading.reserved
    stepping: Allocator = loading
    if tape.has_own_pool:
        stepping = allocator(None if limit is None else limit - loading.reserved, gives_back=not tape.is_recorded)
    for _ in range(1 if tape.is_recorded else times):
        _run(stepping, held, tape.events[tape.loaded :])
    return stepping.most_reserved + (loading.reserved if tape.has_own_pool else 0)


def replay_loading(tape: Tape) -> int:
    """Return the most that is reserved while the model is loaded."""
    loading = _kind(tape)()
    _run(loading, {}, tape.events[: tape.loaded])
    return loading.most_reserved


def _kind(tape: Tape) -> type[ExpandableAllocator | FixedAllocator]:
    return ExpandableAllocator if tape.is_expandable else FixedAllocator


def _run(allocator: Allocator, held: dict[int, Callable[[], None]], events: Sequence[tuple[int, int]]) -> None:
    for number, size in events:
        if size > 0:
            held[number] = allocator.take(size)
        elif size < 0:
            held.pop(number)()
