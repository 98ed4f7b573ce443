"""What a cluster has to do for a sweep: run a function on some node, and say what became of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from lora_lab.cluster_config import ClusterConfig


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


def engine_of(asked: ClusterConfig, on_card: bool, folder: Path) -> Engine:
    """Return the cluster that was asked for.

    Args:
        on_card: whether each job needs a card.
        folder: gets the jobs' files; the nodes have to see it.

    Raises: InvalidInput when it cannot be used from here."""
    from lora_lab.sweep.cluster.slurm import Slurm  # with what only that needs

    return Slurm(asked, on_card, folder)
