"""The workers that share a trial, seen from one of them: what they exchange, and how the others learn that one hangs.

Trainer and accelerate do not know of the group: each worker's Trainer trains alone, on rows of its own, and what its
step found is exchanged between its backward and its optimizer (`shared_step.py`). So every engine works as for one
card, and no collective falls into a recorded step.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lora_lab.outcome import Unsupported
from lora_lab.seat import RENDEZVOUS, Attendance, Seat

_HANGS_SECONDS, _SLOWER = 20.0, 10.0
"""A worker hangs when others wait for it, and its step has taken more than this plus `_SLOWER` times its longest so
far."""

_FIRST_SECONDS = 600.0
"""The same before any step was timed."""

_GIVEN_UP = timedelta(minutes=10)
"""After this time torch gives up an exchange that nobody promised to come to: between steps a worker may load or
compile for minutes longer than another."""

_WORD_SECONDS = 10.0
"""For this time a worker that lost the others says nothing: the one that was at fault says why, or is seen to be gone,
and the group is ended for that reason."""

_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""All workers are on one host, so that nothing listens on its network."""

_T = TypeVar("_T")


class Group:
    """The workers of one trial. A worker alone is a group too, which exchanges nothing."""

    def __init__(self, seat: Seat | None = None) -> None:
        """Take the seat; `connect` comes before the first exchange."""
        seat = Seat() if seat is None else seat
        self.rank, self.world_size = seat.rank, seat.world_size
        self.backend = ""
        """What carries the gradients: nccl or gloo; empty for a worker alone."""
        self._meeting = seat.meeting
        self._exchanges = 0
        self._stepped_t: float | None = None
        self._longest_step = 0.0
        self._promised = math.inf
        """The seconds in which this worker comes to its next exchange, as it has promised."""
        self._attendance = None if seat.meeting is None else Attendance(seat.meeting, seat.world_size)

    @property
    def is_lead(self) -> bool:
        """Return whether this worker reports for the trial."""
        return self.rank == 0

    @property
    def is_shared(self) -> bool:
        """Return whether there are other workers."""
        return self.world_size > 1

    def connect(self, device: torch.device) -> None:
        """Meet the other workers.

        Raises: Unsupported where torch was built without what is needed."""
        if self._meeting is None:
            return
        on_card = device.type == "cuda"
        if not dist.is_available() or not dist.is_gloo_available() or (on_card and not dist.is_nccl_available()):
            raise Unsupported(
                f"a trial over several workers needs torch.distributed with gloo{' and nccl' if on_card else ''}, and "
                "this build of torch has it not. Use placement=one."
            )
        for name, value in _LOOPBACK.items():
            os.environ.setdefault(name, value)
        self.backend = "nccl" if on_card else "gloo"
        store = dist.FileStore(str(self._meeting / RENDEZVOUS), self.world_size)  # type: ignore[attr-defined]
        self._exchange(
            lambda: dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_card else "gloo",
                store=store,
                rank=self.rank,
                world_size=self.world_size,
                timeout=_GIVEN_UP,
            )
        )

    def gather(self, mine: _T) -> list[_T]:
        """Return what each worker has given, in the order of ranks."""
        if not self.is_shared:
            return [mine]
        found: list[Any] = [None] * self.world_size
        self._exchange(lambda: dist.all_gather_object(found, mine))
        return found

    def from_lead(self, run: Callable[[], _T]) -> _T:
        """Let the lead alone do something, and return its result to all; none goes on before it is done."""
        found: list[Any] = self.gather(run() if self.is_lead else None)
        result: _T = found[0]
        return result

    def share_of(self, items: Sequence[_T]) -> list[_T]:
        """Return this worker's share of items that all workers have: every world_size-th. All get equally many, since
        workers that share a model's weights come to each of its layers together: where items are too few, some get the
        last one, too."""
        rounds = math.ceil(len(items) / self.world_size)
        places = (turn * self.world_size + self.rank for turn in range(rounds))
        return [items[min(place, len(items) - 1)] for place in places]

    def joined(self, mine: Sequence[_T], count: int) -> list[_T]:
        """Return the results for all items, in their order.

        Args:
            mine: those for this worker's `share_of`.
            count: the number of items.
        """
        shares = self.gather(list(mine))
        return [shares[place % self.world_size][place // self.world_size] for place in range(count)]

    def begin_step(self) -> None:
        """Come to the exchange of a step. The next is promised for when a step as long as the longest would be over."""
        now = time.monotonic()
        if self._stepped_t is not None:
            self._longest_step = max(self._longest_step, now - self._stepped_t)
        timed = self._longest_step > 0.0
        self._come(_HANGS_SECONDS + _SLOWER * self._longest_step if timed else _FIRST_SECONDS)
        self._stepped_t = now

    def end_steps(self) -> None:
        """Promise nothing any more: what follows takes its time, and the steps behind it are timed again."""
        self._stepped_t, self._longest_step, self._promised = None, 0.0, math.inf
        if self._attendance is not None:
            self._attendance.note(self.rank, self._exchanges)

    def sum(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum of those of all workers; within a step."""
        self._guarded(lambda: dist.all_reduce(tensor))

    def part_of(self, whole: Tensor) -> Tensor:
        """Return a copy of this worker's part, one of equal ones."""
        return whole.view(self.world_size, -1)[self.rank].clone()

    def start_gathering(self, whole: Tensor, part: Tensor) -> Any:
        """Begin to fill `whole` with the parts of all workers, in the order of ranks. Return what `finish` takes."""
        self._come(self._promised)
        return self._guarded(lambda: dist.all_gather_into_tensor(whole, part, async_op=True))

    def finish(self, under_way: Any) -> None:
        """Let what is queued on the device from now on see what was gathered."""
        self._guarded(under_way.wait)

    def _exchange(self, run: Callable[[], object]) -> None:
        self._come(math.inf)
        self._guarded(run)

    def _come(self, seconds: float) -> None:
        """Note that this worker is at an exchange, and promises to be at the next within `seconds`."""
        assert self._attendance is not None
        self._exchanges += 1
        self._promised = seconds
        self._attendance.note(self.rank, self._exchanges, seconds)

    def _guarded(self, run: Callable[[], _T]) -> _T:
        try:
            return run()
        except RuntimeError as error:
            time.sleep(_WORD_SECONDS)
            assert self._attendance is not None
            behind = self._attendance.behind(self._exchanges)
            who = f"; rank {' and '.join(map(str, behind))} did not come to it" if behind else ""
            raise RuntimeError(f"an exchange with the other workers failed{who}: {error}") from error
