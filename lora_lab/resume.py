"""Go on with a job from its last checkpoint: python -m lora_lab resume=true hydra.run.dir=FOLDER

Everything that decides what is trained is read from FOLDER. The command line may repeat it, and may change on which
device the job runs and how it is recorded."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_lab.composition.compose import stored_config
from lora_lab.composition.keys import GROUPS
from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.outcome import Outcome
from lora_lab.reading import Damaged
from lora_lab.settings import Effect, settings_of
from lora_lab.store.heartbeat import gone
from lora_lab.store.multirun import folders
from lora_lab.store.record import params
from lora_lab.store.trial_folder import Manifest, TrialFolder
from lora_lab.trial.session import Request

SETTINGS_OF_THE_JOB = "With resume=true the settings are those in the job's folder: leave all others out."

_NULL = "None"
"""How a record has a setting without a value."""

_HOW_IT_RUNS = ("device", "share_device", "cooldown_celsius", "isolation")
"""Settings that change nothing about what is trained, though they may change how fast."""


def resumption(folder: Path, asked: TrialConfig, choices: dict[str, str], overrides: Sequence[str]) -> Request:
    """Return the request that goes on with the job in `folder`.

    Args:
        asked: the config as the command line gives it, with the defaults of everything that it does not name.
        choices: the option of each group of that config.
        overrides: what the command line names, as Hydra has it.

    Raises: InvalidInput when no job can go on there, or the command line asks for another training; Damaged."""
    there = TrialFolder(folder)
    before = _manifest(there)
    tracking = dataclasses.replace(before.tracking)  # the recorded one stays as it is
    config = dataclasses.replace(stored_config(folder / "config.yaml"), tracking=tracking, resume=False)
    _check_resumable(there, before, config)
    faults = [*_apply(config, asked, choices, overrides, before.record.params)]
    if faults:
        raise InvalidInput(
            *faults,
            f"The job in {folder} goes on as it was begun: leave out what differs. For another training, leave out "
            "resume=true and hydra.run.dir.",
        )
    return Request(
        config=config,
        choices={group: before.record.params.get(group, choices[group]) for group in GROUPS},
        command=before.record.tags.get("command", ""),
        folder=folder,
        resumed=before,
    )


def _manifest(there: TrialFolder) -> Manifest:
    before = there.manifest()
    if before is None:
        job = _job_near(there.path)
        example = "" if job is None else f" Perhaps you mean this one:\n  {job.resume_command}"
        raise InvalidInput(
            f"resume=true goes on with a job, and {there.path} holds none. Name the job's folder with "
            f"hydra.run.dir=FOLDER. For a sweep, add -m or choose one with sweep=NAME.{example}"
        )
    return before


def _job_near(folder: Path) -> TrialFolder | None:
    """Return the job inside whose folder this one is, or else the newest one below multirun/ that was cut off."""
    inside = [TrialFolder(above) for above in folder.absolute().parents]
    newest = [TrialFolder(path) for path in sorted(folders(), reverse=True)]
    return next((each for each in (*inside, *newest) if each.can_go_on and not _finished(each)), None)


def _check_resumable(there: TrialFolder, before: Manifest, config: TrialConfig) -> None:
    """Raise InvalidInput when the trial is not a job, is part of a sweep, finished or still runs; Damaged."""
    if not config.train.is_job:
        raise InvalidInput(
            f"{there.path} holds a trial that is not a job: it has no train.epochs and no train.max_steps, and saved "
            "no checkpoint to go on from. Run it again, without resume=true and hydra.run.dir."
        )
    if before.record.parent is not None:
        raise InvalidInput(
            f"{there.path} holds a trial of a sweep. Resume the sweep: its command with -m and resume=true."
        )
    if not gone(before.owner, there.path):
        raise InvalidInput(
            f"the job in {there.path} still runs, in process {before.owner.pid} of {before.owner.host}. "
            "Wait for its end, or end that process first."
        )
    if _finished(there):
        raise InvalidInput(
            f"the job in {there.path} has finished, so there is nothing to go on with. For a longer training, run a "
            "new job with a larger train.epochs or train.max_steps."
        )


def _finished(there: TrialFolder) -> bool:
    try:
        record = there.record(series=False)
    except Damaged:  # it is written again
        return False
    return record is not None and record.outcome == Outcome.finished.value


def _apply(
    config: TrialConfig, asked: TrialConfig, choices: dict[str, str], overrides: Sequence[str], recorded: dict[str, str]
) -> Iterator[str]:
    """Take over from the command line what may change, and yield what would change the training."""
    given, free = params(asked, choices), _free()
    for name in (override.lstrip("+~").partition("=")[0].partition("@")[0] for override in overrides):
        if name in free or name == "tracking":
            for key in [key for key in given if key == name or key.startswith(f"{name}.")]:
                if key != "resume" and key not in GROUPS:
                    _set(config, key, _get(asked, key))
        elif name not in given:
            yield f"{name} cannot be given together with resume=true."
        elif given[name] != recorded.get(name):
            was = recorded.get(name, _NULL)
            begun = f"without {name}" if was == _NULL else f"with {name}={was}"
            yield f"{name}={'null' if given[name] == _NULL else given[name]} was given, but the job was begun {begun}."


def _free() -> set[str]:
    """Return the settings that may change between two attempts."""
    none = {each.key for each in settings_of(TrialConfig) if each.effect is Effect.none} | {*_HOW_IT_RUNS}
    return {each.key for each in settings_of(TrialConfig) if {each.key, each.key.partition(".")[0]} & none}


def _get(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def _set(config: TrialConfig, key: str, value: Any) -> None:
    group, _, name = key.rpartition(".")
    setattr(_get(config, group) if group else config, name, value)
