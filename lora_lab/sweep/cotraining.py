"""The points of a sweep that train together: which they are, and how they are run."""

import copy
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.cotrain import FACTORS
from lora_lab.reading import Damaged
from lora_lab.store.fingerprint import point_digest
from lora_lab.store.folder_checks import leave_empty
from lora_lab.store.sweep_folder import Planned
from lora_lab.sweep.plan import GridPoint
from lora_lab.trial.cotrained import run_together
from lora_lab.trial.session import Request


def job_of(config: TrialConfig) -> str:
    """Return the digest of what members of one job have in common: everything but what `cotrain` names."""
    common = copy.deepcopy(config)
    for name in config.cotrain:
        *groups, field = FACTORS[name].split(".")
        node = common
        for group in groups:
            node = getattr(node, group)
        setattr(node, field, 1)
    return point_digest(common)


def jobs_of(points: Sequence[GridPoint]) -> dict[str, str]:
    """Return the job of each point by its digest; empty without `cotrain`.

    Raises: InvalidInput when no points would train together."""
    asked = {tuple(point.config.cotrain) for point in points}
    if asked == {()}:
        return {}
    if len(asked) > 1:
        raise InvalidInput("cotrain holds for a whole sweep; give it one value for all points.")
    named = f"cotrain={','.join(points[0].config.cotrain)}"
    searched = next((point.searched for point in points if point.searched), "")
    if searched:
        raise InvalidInput(f"{searched}=max tries one trial after the other. Leave {named} out, or give a number.")
    found = {point.digest: job_of(point.config) for point in points}
    if len(set(found.values())) == len(points):
        settings = " and ".join(FACTORS[name] for name in points[0].config.cotrain)
        raise InvalidInput(
            f"{named}: no two points differ in {settings} alone, so none would train together. Sweep several values "
            "of it, for example -m method.rank=8,16 cotrain=rank, or leave cotrain out."
        )
    return found


def by_job(trials: Sequence[Planned], jobs: Mapping[str, str]) -> list[tuple[Planned, int]]:
    """Return the trials with the number of their job: those of one job and repeat next to each other, in the order in
    which the first of them stands."""
    numbers: dict[tuple[int, str], int] = {}
    for trial in trials:
        numbers.setdefault((trial.repeat, jobs[trial.point]), len(numbers))
    found = [(trial, numbers[trial.repeat, jobs[trial.point]]) for trial in trials]
    return sorted(found, key=lambda each: each[1])


class Joint:
    """A runner that runs all trials that were submitted as one job."""

    def __init__(self) -> None:
        self.broken: list[str] = []
        self._submitted: list[Request] = []

    def __enter__(self) -> "Joint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @property
    def free(self) -> int:
        """Return 1: a job takes any number of trials."""
        return 1

    @property
    def running(self) -> int:
        """Return the number of trials that wait for their job to begin."""
        return len(self._submitted)

    def submit(self, request: Request) -> None:
        """Add a trial to the job."""
        self._submitted.append(request)

    def next_ended(self) -> None:
        """Run the job.

        Raises: KeyboardInterrupt on Ctrl-C, after all its trials were recorded."""
        requests, self._submitted = self._submitted, []
        try:
            run_together(requests)
        except (InvalidInput, Damaged) as refusal:
            print(f"Refused, nothing was trained:\n{refusal}", file=sys.stderr)
            for request in requests:
                leave_empty(request.folder)
        except Exception as error:  # broad: the other jobs go on
            self.broken.append(f"{', '.join(request.folder.name for request in requests)}: {error!r}")
