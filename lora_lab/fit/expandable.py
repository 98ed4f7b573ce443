"""Follow the rules of torch's caching allocator where its segments grow, for the memory that it takes from the driver.

The rules are those of c10/cuda/CUDACachingAllocator.cpp with expandable segments. Requests are rounded to 512 bytes.
Those up to 1 MiB share one range of addresses, larger ones another. A range grows at its end, by pages of 2 MiB or
20 MiB. The smallest free block that is large enough is taken, but for the block at the range's end, which comes last;
what is left of it is split off. Neighbours that are free become one block. Beyond the limit, pages that are free as a
whole are returned first.
"""

import functools
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass

from lora_lab.fit.allocator import ROUND, SMALL, Allocator, rounded, segment_bytes

_SMALL_PAGE, _PAGE = 2 * 2**20, 20 * 2**20
_ENDLESS = 2**50
"""Addresses of a range: more than any card has memory."""


@dataclass(slots=True, eq=False)
class _Block:
    start: int
    size: int
    before: "_Block | None" = None
    after: "_Block | None" = None
    is_free: bool = False
    is_mapped: bool = True
    """Whether there is memory behind these addresses."""

    def room(self) -> int:
        """Return the bytes that the block can grow to."""
        grows = self.after is not None and not self.after.is_mapped
        return self.size + (self.after.size if grows and self.after is not None else 0)


class _Range:
    """Addresses with memory behind a part of them."""

    def __init__(self, page: int) -> None:
        self._page = page
        self._free: list[tuple[int, int, _Block]] = []
        self._unmapped: list[tuple[int, _Block]] = [(0, _Block(0, _ENDLESS, is_free=True, is_mapped=False))]

    def find(self, size: int) -> _Block | None:
        """Return the free block that torch takes for `size` bytes, None where there is none."""
        place = bisect_left(self._free, (size, -1))
        if place == len(self._free):
            return None
        following = place + 1
        while following < len(self._free) and self._free[following][2].room() < self._free[place][2].room():
            place, following = following, following + 1
        return self._free.pop(place)[2]

    def grow(self, size: int) -> tuple[_Block, int]:
        """Put memory behind the lowest addresses with `size` bytes in a row; return the block and the new bytes."""
        block = next(found for _, found in self._unmapped if _in_a_row(_first(found)) >= size)
        block = _first(block)
        taken = 0
        if not block.is_mapped:
            block, mapped = self._map(block, min(block.size, size))
            taken += mapped
        while block.size < size:
            assert block.after is not None
            block, mapped = self._map(block.after, min(size - block.size, block.after.size))
            taken += mapped
        self._remove(block)
        return block, taken

    def split(self, block: _Block, size: int) -> None:
        """Take `size` bytes of a block; what is left is free."""
        block.is_free = False
        if block.size - size >= ROUND:
            self._put(_cut(block, size))

    def give(self, block: _Block) -> None:
        """Take a block back."""
        self._put(self._merged(block))

    def give_back(self) -> int:
        """Return pages that are free as a whole to the driver; return their bytes."""
        returned = 0
        for _, _, block in list(self._free):
            start = -(-block.start // self._page) * self._page
            end = (block.start + block.size) // self._page * self._page
            if start >= end:
                continue
            self._remove(block)
            if start > block.start:
                inner = _cut(block, start - block.start)
                self._put(block)
                block = inner
            if end < block.start + block.size:
                self._put(_cut(block, end - block.start))
            returned += block.size
            block.is_free, block.is_mapped = True, False
            block = self._merged(block)
            insort(self._unmapped, (block.start, block), key=lambda entry: entry[0])
        return returned

    def _map(self, block: _Block, size: int) -> tuple[_Block, int]:
        """Put memory behind the beginning of an unmapped block; return the free block that has it, and the bytes."""
        size = min(block.size, -(-size // self._page) * self._page)
        self._unmapped.pop(self._place(block))
        if size < block.size:
            rest = _cut(block, size)
            rest.is_free, rest.is_mapped = True, False
            insort(self._unmapped, (rest.start, rest), key=lambda entry: entry[0])
        block.is_mapped = True
        block = self._merged(block)
        self._put(block)
        return block, size

    def _merged(self, block: _Block) -> _Block:
        """Join a block with free neighbours of its kind, which are no longer listed."""
        before, after = block.before, block.after
        if before is not None and before.is_free and before.is_mapped == block.is_mapped:
            self._forget(before)
            before.size += block.size
            before.after = after
            if after is not None:
                after.before = before
            block = before
        if after is not None and after.is_free and after.is_mapped == block.is_mapped:
            self._forget(after)
            block.size += after.size
            block.after = after.after
            if after.after is not None:
                after.after.before = block
        return block

    def _forget(self, block: _Block) -> None:
        if block.is_mapped:
            self._remove(block)
        else:
            self._unmapped.pop(self._place(block))

    def _place(self, block: _Block) -> int:
        return bisect_left(self._unmapped, block.start, key=lambda entry: entry[0])

    def _put(self, block: _Block) -> None:
        block.is_free = True
        insort(self._free, (block.size, block.start, block))

    def _remove(self, block: _Block) -> None:
        block.is_free = False
        self._free.pop(bisect_left(self._free, (block.size, block.start)))


def _cut(block: _Block, size: int) -> _Block:
    """Shorten a block to `size` bytes; return the rest as a block after it."""
    rest = _Block(block.start + size, block.size - size, block, block.after)
    if block.after is not None:
        block.after.before = rest
    block.after, block.size = rest, size
    return rest


def _first(block: _Block) -> _Block:
    return block.before if block.before is not None and block.before.is_free else block


def _in_a_row(block: _Block | None) -> int:
    """Return the bytes from a block on that nobody uses."""
    size = 0
    while block is not None and block.is_free:
        size += block.size
        block = block.after
    return size


class ExpandableAllocator(Allocator):
    """The allocator with segments that grow."""

    def __init__(self, limit: int | None = None, gives_back: bool = True) -> None:
        """Begin without segments; see Allocator."""
        super().__init__(limit, gives_back)
        self._ranges = {True: _Range(_SMALL_PAGE), False: _Range(_PAGE)}

    def take(self, size: int) -> Callable[[], None]:
        """Take `size` bytes; return what gives them back.

        Raises: OutOfMemory beyond the limit."""
        size = rounded(size)
        of = self._ranges[size <= SMALL]
        block = of.find(size)
        if block is None:
            self._make_room(segment_bytes(size))  # torch compares as if all of it were new
            block, taken = of.grow(size)
            self._reserve(taken)
        of.split(block, size)
        return functools.partial(of.give, block)

    def return_cached(self) -> None:
        """Return pages that are free as a whole to the driver."""
        self.reserved -= sum(of.give_back() for of in self._ranges.values())
