"""A Slurm cluster, through submitit: each job is a function that one node calls."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_lab.config import InvalidInput
from lora_lab.places_config import ClusterConfig
from lora_lab.sweep.cluster.engine import NotSubmitted

_NAME = "slurm "

_ASK_AGAIN_SECONDS = 10.0
"""Slurm is not asked more often what became of its jobs."""

_OVER = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
)
"""The states of jobs that do not run any more. submitit takes a preempted job for one that Slurm will start again, and
a suspended one for one that is over."""

_ANSWER_SECONDS = 60.0

_VISIBLE_SECONDS = 5.0
"""How long what a job has written may take until it is seen on this machine."""


class Slurm:
    """Slurm as sbatch, sacct and scancel show it. Many small clusters keep no accounts, and sacct says nothing: there
    squeue is asked. More of sbatch's options are set by its SBATCH_* variables."""

    def __init__(self, asked: ClusterConfig, on_card: bool, folder: Path) -> None:
        """Raise InvalidInput when this machine cannot submit jobs."""
        try:
            import submitit
        except ImportError:
            raise InvalidInput(
                "cluster=slurm needs the package submitit. Type:\n  pip install 'lora_lab[slurm]'"
            ) from None
        self._folder = folder
        try:
            self._executor = submitit.SlurmExecutor(folder)
        except RuntimeError:
            raise InvalidInput(
                "cluster=slurm submits jobs with sbatch and srun, and they are not on this machine. Type the command "
                "on a login node of the cluster."
            ) from None
        options: dict[str, Any] = {"time": asked.minutes, "job_name": "lora_lab"}
        # a lost trial is submitted again, in a folder of its own; most sites have Slurm start the same job once more
        options["additional_parameters"] = {"no-requeue": True}
        if asked.partition is not None:
            options["partition"] = asked.partition
        if on_card:
            options["gpus_per_node"] = 1
        self._executor.update_parameters(**options)
        self._keeps_accounts = _says("sacct", "-o", "JobID,State,NodeList", "--parsable2", "-j", "0")[0]
        self._asked = -_ASK_AGAIN_SECONDS
        """When the accounts were last asked about all jobs."""
        self._queued: dict[str, tuple[float, bool]] = {}
        """When a job was last looked for in the queue, and whether it was there."""
        self._jobs: dict[str, submitit.Job[Any]] = {}
        self._ended: dict[str, float] = {}
        """When a job was first seen to have ended without a word."""

    def start(self, function: Callable[..., Any], *arguments: Any) -> str:
        """Submit a job."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        try:
            job = self._executor.submit(function, *arguments)
        except (FailedJobError, FailedSubmissionError, OSError, subprocess.SubprocessError) as error:
            raise NotSubmitted(f"Slurm did not take the job: {error}") from error
        name = f"{_NAME}{job.job_id}"
        self._jobs[name] = job
        return name

    def is_over(self, job: str) -> bool:
        """Return whether a job has told its result, or Slurm says that it has ended without one. Nothing is known about
        the jobs of another cluster."""
        if not job.startswith(_NAME):
            return False
        known = self._job(job)
        if known.paths.result_pickle.exists():
            return True
        if self._is_going_on(known) if self._keeps_accounts else self._is_queued(str(known.job_id)):
            return False
        return time.monotonic() - self._ended.setdefault(job, time.monotonic()) > _VISIBLE_SECONDS

    def told(self, job: str) -> Any:
        """Return what the function returned; None when it did not."""
        from submitit.core.utils import pickle_load

        if not job.startswith(_NAME):
            return None
        known = self._job(job)
        if not known.paths.result_pickle.exists():
            return None
        how, answer = pickle_load(known.paths.result_pickle)
        return answer if how == "success" else None

    def log(self, job: str) -> str:
        """Return the end of the job's error output."""
        return "\n".join((self._job(job).stderr() or "").strip().splitlines()[-5:])

    def cancel(self, job: str) -> None:
        """End a job with scancel."""
        if job.startswith(_NAME):
            self._job(job).cancel(check=False)

    def _is_going_on(self, known: Any) -> bool:
        """Return whether a job waits or runs by the accounts, which know it a moment after it was submitted."""
        is_due = time.monotonic() - self._asked >= _ASK_AGAIN_SECONDS
        if is_due:
            self._asked = time.monotonic()
        state = known.watcher.get_state(known.job_id, mode="force" if is_due else "cache")
        return state.split(" ")[0] not in _OVER

    def _is_queued(self, number: str) -> bool:
        """Return whether a job waits or runs. It does where the controller does not answer."""
        now = time.monotonic()
        asked, was_queued = self._queued.get(number, (-_ASK_AGAIN_SECONDS, True))
        if now - asked < _ASK_AGAIN_SECONDS:
            return was_queued
        answered, said = _says("squeue", "--noheader", "--format=%T", "--jobs", number)
        is_queued = bool(said.strip()) if answered else "Invalid job id" not in said
        self._queued[number] = now, is_queued
        return is_queued

    def _job(self, name: str) -> Any:
        """Return a job, also one of an earlier process."""
        from submitit import SlurmJob

        if name not in self._jobs:
            self._jobs[name] = SlurmJob(self._folder, name.removeprefix(_NAME))
        return self._jobs[name]


def _says(*command: str) -> tuple[bool, str]:
    """Run one of Slurm's commands. Return whether it succeeded, and what it printed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_ANSWER_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    return done.returncode == 0, done.stdout or done.stderr
