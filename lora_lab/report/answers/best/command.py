"""The command that runs a measured configuration."""

from collections.abc import Sequence

from lora_lab.store.trials import Trial

_STATED = ("model", "method", "engine", "optimizer", "precision", "batch_size", "seq_len", "gradient_checkpointing")


def recorded(trial: Trial) -> str:
    """Return the command recorded for a trial. Older versions recorded a preset's, which would run its whole sweep."""
    found = trial.tags.get("command", "no command was recorded")
    if " sweep=" not in found:
        return found
    return f"{found}   (runs the whole sweep; an older version did not record this point's own command)"


def runnable(trial: Trial, others: Sequence[Trial]) -> str:
    """Return the recorded command of a trial, or a short one where the recorded one would run a whole sweep."""
    found = trial.tags.get("command", "")
    return found if found and " sweep=" not in found else short(trial, others)


def short(trial: Trial, others: Sequence[Trial]) -> str:
    """Return a command of the settings that decide memory and speed, for a trial whose preset the user does not have.

    Args:
        others: trials that it was chosen among. A setting in which they differ is stated too."""
    settings = [f"{key}={trial.params[key]}" for key in (*_STATED, *_varied(trial, others)) if key in trial.params]
    return " ".join(["lora-lab", *settings])


def _varied(trial: Trial, others: Sequence[Trial]) -> list[str]:
    """Return settings within a group's option that differ between trials of that option: method.rank."""
    found = []
    for key, value in sorted(trial.params.items()):
        group, dot, _ = key.partition(".")
        alike = [one for one in others if one.params.get(group) == trial.params.get(group)]
        if dot and group in _STATED and any(one.params.get(key, value) != value for one in alike):
            found.append(key)
    return found
