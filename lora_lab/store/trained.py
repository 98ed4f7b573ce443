"""Find the trial whose trained model the user names."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from lora_lab.base_weights import ADAPTER, MODEL, WEIGHTS, trained_in
from lora_lab.config import InvalidInput
from lora_lab.paths import MULTIRUN
from lora_lab.quality.row_losses import HeldoutRows, heldout_rows
from lora_lab.reading import Damaged
from lora_lab.store.folder_runs import FolderRuns
from lora_lab.store.local_store import local_address
from lora_lab.store.mlflow_client import fetch_run
from lora_lab.store.multirun import LATEST
from lora_lab.store.record import KINDS
from lora_lab.store.stored_runs import open_store
from lora_lab.store.sweep_folder import SweepFolder
from lora_lab.store.trial_folder import MANIFEST, TrialFolder

CONFIG = "config.yaml"
RUN_HELP = f"a trial's folder, {LATEST}, or a trial's id or the beginning of one"

_WHOLE_ID = 32
"""Characters of a run's id."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A trial that has left what it has trained."""

    folder: Path
    """It holds the config and what was trained."""
    weights: Path
    """The folder of what was trained: adapter or model."""
    kinds: str
    """Whether its rows were conversations, passages or both; empty where the record does not say so."""
    heldout: HeldoutRows | None = None
    """The losses of its held-out rows; None where its record has none."""


def find_trained(run: str, place: Path) -> Trained:
    """Return the trial that is named.

    Args:
        run: a folder, `latest`, or an id or the beginning of one: of a trial under multirun/, or else of a run in the
            local store.
        place: an empty folder, where the files of a run in the store are put.

    Raises: InvalidInput, TrackingFailed."""
    if not run:
        raise InvalidInput(f"RUN is empty. Name {RUN_HELP}.")
    folder = MULTIRUN / LATEST if run == LATEST and not Path(run).is_dir() else Path(run)
    if run == LATEST and not folder.is_dir():
        raise InvalidInput(f"there is no {folder}: no trial was run in this folder. Name {RUN_HELP}.")
    tags: dict[str, str] = {}
    if not folder.is_dir():
        found = FolderRuns(experiment=None).trial_folder(run)
        if found is None:
            found, tags = place, _fetched(run, place)
        folder = found
    if SweepFolder(folder).exists:
        trials = sorted(str(each) for each in folder.iterdir() if trained_in(each) is not None)
        listed = "".join(f"\n  {each}" for each in trials[:5])
        raise InvalidInput(
            f"{run} is a sweep. Name one of its trials{':' if trials else ', none of which has left a model.'}{listed}"
        )
    if not (folder / CONFIG).is_file():
        above = next((each for each in folder.absolute().parents if (each / MANIFEST).is_file()), None)
        advice = f"Name {RUN_HELP}." if above is None else f"It is inside the trial {above}: name that."
        raise InvalidInput(f"{run} holds no {CONFIG}, so it is not a trial. {advice}")
    weights = trained_in(folder)
    if weights is None:
        there = TrialFolder(folder)
        cut_off = f"It is a job that goes on from its last checkpoint with:\n  {there.resume_command}"
        raise InvalidInput(
            f"{run} holds no {ADAPTER} and no {MODEL}: the trial did not come to its end, or its disk was full, or "
            f"it is a run of the store, which keeps no whole model. "
            + (cut_off if there.can_go_on else "Name the folder of a trial that finished.")
        )
    tags = tags or _tags(folder)
    return Trained(folder, weights, tags.get(KINDS, ""), heldout_rows(tags))


def _tags(folder: Path) -> dict[str, str]:
    """Return the tags of a trial's record; none where there is no whole one."""
    with contextlib.suppress(Damaged):
        record = TrialFolder(folder).record(series=False)
        return {} if record is None else record.tags
    return {}


def _fetched(run: str, place: Path) -> dict[str, str]:
    """Put the files of a run in the local store into `place`, and return its tags."""
    try:
        store = local_address()
    except InvalidInput:
        raise InvalidInput(
            f"{run} is neither a folder nor the id of a trial under multirun/, and there is no store at "
            f"{Path('mlruns').resolve()}. Change to the folder where the trials were run, or name {RUN_HELP}."
        ) from None
    if len(run) < _WHOLE_ID:
        run = open_store(store).id_of(run)
    return fetch_run(store, run, (CONFIG, ADAPTER, WEIGHTS), place)[1]
