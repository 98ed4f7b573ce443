"""What torch's caching allocator does with either kind of segments: count what it takes, and keep to a limit."""

from abc import ABC, abstractmethod
from collections.abc import Callable

ROUND, SMALL = 512, 2**20
"""Requests are rounded to multiples of ROUND bytes; those up to SMALL come out of memory of their own."""
_SMALL_SEGMENT, _MIDDLE_SEGMENT, _MIDDLE, _LARGE_ROUND = 2 * 2**20, 20 * 2**20, 10 * 2**20, 2 * 2**20


class OutOfMemory(Exception):
    """The limit is reached, and nothing that is cached can be returned."""


class Allocator(ABC):
    """Counts what is reserved, and remembers the most."""

    def __init__(self, limit: int | None = None, gives_back: bool = True) -> None:
        """Set the limit of reserved bytes; None is no limit.

        Args:
            gives_back: whether cached memory is returned at the limit; while a graph is recorded, it is not.
        """
        self.reserved = self.most_reserved = 0
        self._limit, self._gives_back = limit, gives_back

    @abstractmethod
    def take(self, size: int) -> Callable[[], None]:
        """Take `size` bytes; return what gives them back.

        Raises: OutOfMemory beyond the limit."""

    @abstractmethod
    def return_cached(self) -> None:
        """Return to the driver what is free as a whole."""

    def _make_room(self, asked: int) -> None:
        """Return what is cached where the limit needs it.

        Raises: OutOfMemory where that is not enough."""
        if self._limit is None:
            return
        if self.reserved + asked > self._limit and self._gives_back:
            self.return_cached()
        if self.reserved + asked > self._limit:
            raise OutOfMemory

    def _reserve(self, size: int) -> None:
        self.reserved += size
        self.most_reserved = max(self.most_reserved, self.reserved)


def rounded(size: int) -> int:
    """Return the bytes of a block for a request."""
    return max(ROUND, -(-size // ROUND) * ROUND)


def segment_bytes(size: int) -> int:
    """Return what torch asks for where no free block is large enough for `size` bytes."""
    if size <= SMALL:
        return _SMALL_SEGMENT
    return _MIDDLE_SEGMENT if size < _MIDDLE else -(-size // _LARGE_ROUND) * _LARGE_ROUND
