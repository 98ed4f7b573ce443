"""What a cluster has to do for a sweep: run a function on some node, and say what became of it."""

from collections.abc import Callable
from typing import Any, Protocol


class NotSubmitted(RuntimeError):
    """The cluster did not take a job; the text says why."""


class Engine(Protocol):
    """A cluster. Its jobs have names such as `slurm 123`, which later processes understand too."""

    def start(self, function: Callable[..., Any], *arguments: Any) -> str:
        """Have a node call a function. Return the job's name.

        Raises: NotSubmitted."""
        ...

    def is_over(self, job: str) -> bool:
        """Return whether a job has ended, as far as the cluster knows."""
        ...

    def told(self, job: str) -> Any:
        """Return what the function returned; None when it did not, or not yet."""
        ...

    def log(self, job: str) -> str:
        """Return the last lines that a job has printed."""
        ...

    def cancel(self, job: str) -> None:
        """End a job that runs, or take it back where it waits. A job that is over stays as it is."""
        ...
