"""Follow the rules of torch's caching allocator with segments of fixed size: what it takes from the driver.

The rules are those of c10/cuda/CUDACachingAllocator.cpp with its default settings. Requests are rounded to 512 bytes;
up to 1 MiB they come out of segments of 2 MiB, below 10 MiB out of segments of 20 MiB, and larger ones get a segment of
their own, rounded to 2 MiB. The smallest free block that is large enough is taken, and split where enough is left.
Neighbours that are free become one block. Where the driver has no more, segments that are free as a whole are returned.
"""

import functools
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass

from lora_lab.fit.allocator import ROUND, SMALL, Allocator, rounded, segment_bytes


@dataclass(slots=True, eq=False)
class _Block:
    start: int
    """Address: segments have addresses far apart."""
    size: int
    is_small: bool
    before: "_Block | None" = None
    after: "_Block | None" = None
    is_free: bool = False


class FixedAllocator(Allocator):
    """The allocator with segments of fixed size."""

    def __init__(self, limit: int | None = None, gives_back: bool = True) -> None:
        """Begin without segments; see Allocator."""
        super().__init__(limit, gives_back)
        self._free: dict[bool, list[tuple[int, int, _Block]]] = {True: [], False: []}
        self._next = 0

    def take(self, size: int) -> Callable[[], None]:
        """Take `size` bytes; return what gives them back.

        Raises: OutOfMemory beyond the limit."""
        size = rounded(size)
        is_small = size <= SMALL
        free = self._free[is_small]
        place = bisect_left(free, (size, -1))
        block = free.pop(place)[2] if place < len(free) else self._segment(size, is_small)
        block.is_free = False
        left = block.size - size
        if left >= ROUND if is_small else left > SMALL:
            rest = _Block(block.start + size, left, is_small, block, block.after)
            if block.after is not None:
                block.after.before = rest
            block.after, block.size = rest, size
            self._put(rest)
        return functools.partial(self._give, block)

    def return_cached(self) -> None:
        """Return the segments that are free as a whole to the driver."""
        for free in self._free.values():
            whole = [entry for entry in free if entry[2].before is None and entry[2].after is None]
            self.reserved -= sum(size for size, _, _ in whole)
            free[:] = [entry for entry in free if entry[2].before is not None or entry[2].after is not None]

    def _give(self, block: _Block) -> None:
        before, after = block.before, block.after
        if before is not None and before.is_free:
            self._remove(before)
            before.size += block.size
            before.after = after
            if after is not None:
                after.before = before
            block = before
        if after is not None and after.is_free:
            self._remove(after)
            block.size += after.size
            block.after = after.after
            if after.after is not None:
                after.after.before = block
        self._put(block)

    def _segment(self, size: int, is_small: bool) -> _Block:
        whole = segment_bytes(size)
        self._make_room(whole)
        self._reserve(whole)
        self._next += 2**50
        return _Block(self._next, whole, is_small)

    def _put(self, block: _Block) -> None:
        block.is_free = True
        insort(self._free[block.is_small], (block.size, block.start, block))

    def _remove(self, block: _Block) -> None:
        block.is_free = False
        free = self._free[block.is_small]
        free.pop(bisect_left(free, (block.size, block.start)))
