"""A Ray cluster: each job is a task that one node calls, in a process of its own. Tasks end with the process that has
submitted them."""

import contextlib
import ipaddress
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from lora_lab.config import InvalidInput
from lora_lab.places_config import ClusterConfig
from lora_lab.sweep.cluster.engine import NotSubmitted

_AUTH = "RAY_AUTH_MODE"
_ANSWER_SECONDS = 10.0
_THREADS = "OMP_NUM_THREADS"


class RayTasks:
    """Ray as this process's connection to it shows it."""

    def __init__(self, asked: ClusterConfig, on_card: bool) -> None:
        """Raise InvalidInput when this machine cannot submit tasks."""
        address = str(asked.address)
        if not _is_here(address) and os.environ.get(_AUTH) != "token":
            raise InvalidInput(
                f"cluster.address={address} is on a network, where anybody who reaches a Ray cluster without "
                f"authentication can run programs on it. Start the cluster with {_AUTH}=token, and type the command "
                "with it too."
            )
        _check_answers(address)
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        try:
            import ray
        except ImportError:
            raise InvalidInput("cluster=ray needs the package ray. Type:\n  pip install 'lora_lab[ray]'") from None
        if not ray.is_initialized():
            try:
                ray.init(address=address, log_to_driver=False, logging_level="error")
            except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
                raise InvalidInput(
                    f"cluster.address={address}: no Ray cluster answers this machine ({str(error).splitlines()[0]}). "
                    "Type the command on a machine that has joined the cluster with ray start."
                ) from error
        # a process for each task: the server of workers that one has started ends with it
        options = {"num_cpus": 1, "num_gpus": int(on_card), "max_retries": 0, "scheduling_strategy": "SPREAD"}
        self._call = ray.remote(max_calls=1, **options)(_call)
        self._ray = ray
        self._tasks: dict[str, Any] = {}

    def start(self, function: Callable[..., Any], *arguments: Any) -> str:
        """Submit a task."""
        try:
            task = self._call.remote(str(Path.cwd()), function, arguments)
        except self._ray.exceptions.RayError as error:
            raise NotSubmitted(f"Ray did not take the task: {error}") from error
        name = f"ray {task.task_id().hex()}"
        self._tasks[name] = task
        return name

    def is_over(self, job: str) -> bool:
        """Return whether a task has ended. Nothing is known about those of an earlier process."""
        return job in self._tasks and bool(self._ray.wait([self._tasks[job]], timeout=0)[0])

    def told(self, job: str) -> Any:
        """Return what the function returned; None when it did not."""
        answer = self._ended(job)
        return None if isinstance(answer, BaseException) else answer

    def log(self, job: str) -> str:
        """Return the last lines of the error that a task ended with."""
        answer = self._ended(job)
        return "\n".join(str(answer).strip().splitlines()[-5:]) if isinstance(answer, BaseException) else ""

    def cancel(self, job: str) -> None:
        """Interrupt a task, or take it back."""
        if job in self._tasks:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.cancel(self._tasks[job])

    def _ended(self, job: str) -> Any:
        """Return what a task that is over has returned, or the error that it ended with."""
        if not self.is_over(job):
            return None
        try:
            return self._ray.get(self._tasks[job])
        except self._ray.exceptions.RayError as error:
            return error


def _check_answers(address: str) -> None:
    """Raise InvalidInput where nobody answers at an address; Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InvalidInput(
            f"cluster.address={address}: nobody answers there ({error}). Give the head of a Ray cluster that runs, as "
            "ray start --head has shown it, for example cluster.address=10.0.0.1:6379."
        ) from error


def _call(folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Call a function in the folder that the command was typed in: relative paths lead from there."""
    with contextlib.suppress(FileNotFoundError):  # what is called says what the node does not see
        os.chdir(folder)
    _unset_threads()
    return function(*arguments)


def _unset_threads() -> None:
    """Remove the number of threads that Ray gives each task, one for the core that it reserves: a trial has as many as
    on a machine without Ray, unless the user has said how many where the cluster was started."""
    with contextlib.suppress(psutil.Error):
        raylet = psutil.Process().parent()
        if raylet is not None and _THREADS not in raylet.environ():
            os.environ.pop(_THREADS, None)


def _is_here(address: str) -> bool:
    """Return whether an address (host:port) is one that only this machine reaches."""
    host = (address.rpartition(":")[0] or address).strip("[]")
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
