"""Where results are kept: the Tracker protocol, MLflow, and one in memory."""

import logging
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from lora_lab.config import TrackingConfig, TrackingKind
from lora_lab.outcome import Outcome
from lora_lab.secrets import without_secrets
from lora_lab.store.errors import SweepUnknown, TrackingFailed, store_errors
from lora_lab.store.local_store import (
    address_of,
    check_database,
    check_unlocked,
    check_writable,
    create_store,
    database_of,
    has_content,
)
from lora_lab.store.record import RUNNING, Record
from lora_lab.store.tracking_server import check_reachable

_METRICS_A_CALL = 1000
_LONGEST_TAG = 5000


@dataclass(frozen=True, slots=True)
class Which:
    """Tells a store from another one that stood at the same address before."""

    address: str
    made_ms: int | None
    """Unix time; None where the store does not say."""


class Tracker(Protocol):
    """Takes the record of each trial and of each sweep."""

    def deliver(self, record: Record, files: Sequence[Path]) -> str:
        """Record everything, or go on with a run that has part of it. Delivering twice is the same as once: a
        trial that is over in the store stays as it is.

        Args:
            files: files and folders to keep with the run.

        Returns: the store's id of the run.

        Raises: SweepUnknown when the sweep above a trial must be delivered first; TrackingFailed."""

    def end_orphans(self, gone: Callable[[dict[str, str]], bool]) -> int:
        """Mark as killed what is still said to run though its process is gone, as `gone` tells from a run's
        tags. Returns how many.

        Raises: TrackingFailed."""

    def which(self) -> Which:
        """Which store this is.

        Raises: TrackingFailed."""

    def where(self, run_id: str) -> list[str]:
        """Lines that tell a person where the run is and how to look at it."""


class InMemoryTracker:
    """Keeps records in a dictionary: for tests, and for tracking=none, where the trial's folder is the record."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}

    def deliver(self, record: Record, files: Sequence[Path]) -> str:
        """Remember the record."""
        there = self.records.get(record.id)
        if there is None or there.outcome == RUNNING or record.is_sweep:
            self.records[record.id] = record
        return record.id

    def end_orphans(self, gone: Callable[[dict[str, str]], bool]) -> int:
        """Nothing here outlives its process."""
        return 0

    def which(self) -> Which:
        """None that outlives its process."""
        return Which("", None)

    def where(self, run_id: str) -> list[str]:
        """Not in any store."""
        return ["recorded in no store (tracking=none)"]


class MlflowTracker:
    """Records into an MLflow store or server."""

    def __init__(self, uri: str, experiment: str, database: Path | None, look: list[str]) -> None:
        """Connect to a store; an experiment is made when the first run is.

        Args:
            uri: MLflow tracking URI.
            experiment: its name.
            database: the local store's file, with its artifacts beside it; None for a server.
            look: lines that tell how to open the UI; {page} becomes the runs' page.

        Raises: TrackingFailed."""
        from mlflow.tracking import MlflowClient

        self._uri = uri
        with store_errors():
            self._client = MlflowClient(tracking_uri=uri)
            if database is not None:
                # MLflow keeps connections to the file that was at this address when this process first opened it
                self._client._tracking_client.store.engine.dispose()
        self._experiment = experiment
        self._database = database
        self._inode = None if database is None else database.stat().st_ino
        self._look = look

    def deliver(self, record: Record, files: Sequence[Path]) -> str:
        """Find or create the run; params, tags, metrics, series, files; at last the run's status."""
        from mlflow.entities import Metric, RunTag

        ended_ms = record.ended_ms or round(time.time() * 1e3)
        points = [Metric(p.key, p.value, p.t_ms, p.step) for p in record.series]
        points += [Metric(key, value, ended_ms, 0) for key, value in record.metrics.items()]
        with store_errors():
            self._check_present()
            found = self._find(record.id)
            if found is not None and _is_over(found) and not record.is_sweep:
                return str(found.info.run_id)
            run_id = str(found.info.run_id) if found is not None else self._create(record)
            if found is not None and _ORPHAN in found.data.tags:
                self._client.delete_tag(run_id, _ORPHAN)
            tags = [RunTag(key, value) for key, value in _tags(record.tags).items()]
            self._client.log_batch(run_id, params=_params(record.params), tags=tags)
            for start in range(0, len(points), _METRICS_A_CALL):
                self._client.log_batch(run_id, metrics=points[start : start + _METRICS_A_CALL])
            for path in files:
                if path.is_dir():
                    self._client.log_artifacts(run_id, str(path), path.name)
                else:
                    self._client.log_artifact(run_id, str(path))
            if record.outcome == RUNNING:
                self._client.update_run(run_id, status="RUNNING")  # a sweep that is taken up again
            else:
                self._client.set_terminated(run_id, _STATUS.get(record.outcome, "FAILED"), ended_ms)
        return run_id

    def end_orphans(self, gone: Callable[[dict[str, str]], bool]) -> int:
        """Runs in the state RUNNING whose process is gone become KILLED."""
        with store_errors():
            running = self._client.search_runs([self._experiment_id()], "attributes.status = 'RUNNING'")
            orphans = [run.info.run_id for run in running if gone(run.data.tags)]
            for run_id in orphans:
                self._client.set_tag(run_id, "outcome", Outcome.killed.value)
                self._client.set_tag(run_id, _ORPHAN, "its process was gone, and its folder not here")
                self._client.set_terminated(run_id, "KILLED")
        return len(orphans)

    def _check_present(self) -> None:
        """A local database that was deleted or replaced would still take records, through a file that is no more."""
        if self._database is None:
            return
        if not has_content(self._database) or self._database.stat().st_ino != self._inode:
            raise TrackingFailed(f"{self._database} was deleted or replaced since it was opened")
        check_unlocked(self._database)

    def which(self) -> Which:
        """The address, and when the store's first experiment was made: with the store itself."""
        return self._which

    @cached_property
    def _which(self) -> Which:
        from mlflow.exceptions import MlflowException

        with store_errors():
            try:
                return Which(self._uri, self._client.get_experiment("0").creation_time)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return Which(self._uri, None)

    def _find(self, record_id: str) -> Any:
        """The run of a record; None when there is none. A run that somebody deleted is restored: of a sweep's there
        are trials that lie under it, and others come."""
        from mlflow.entities import ViewType

        asked = {"filter_string": f"tags.record_id = '{record_id}'", "max_results": 1}
        found = self._client.search_runs([self._experiment_id()], **asked)
        if not found:
            found = self._client.search_runs([self._experiment_id()], run_view_type=ViewType.DELETED_ONLY, **asked)
            for run in found:
                self._client.restore_run(run.info.run_id)
                self._client.set_tag(run.info.run_id, "restored", "its run was deleted, and a record of it came after")
        return found[0] if found else None

    def _create(self, record: Record) -> str:
        # all tags at once: a run that a kill leaves here says whose it was
        tags = _tags(record.tags) | {"record_id": record.id}
        tags |= {"mlflow.source.name": "lora_lab", "mlflow.source.type": "LOCAL"}
        if record.parent is not None:
            parent = self._find(record.parent)
            if parent is None:
                raise SweepUnknown(f"the store does not know the sweep of {record.name}")
            tags["mlflow.parentRunId"] = parent.info.run_id
        run = self._client.create_run(self._experiment_id(), record.started_ms, tags, record.name)
        return str(run.info.run_id)

    def where(self, run_id: str) -> list[str]:
        """The run, the UI's command, and the page with the runs (MLflow opens on another one)."""
        with store_errors():
            page = f"#/experiments/{self._experiment_id()}/runs?workflowType=machine_learning"
        return [f"run {run_id} of experiment {self._experiment}", *(ln.replace("{page}", page) for ln in self._look)]

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(self._experiment)
        if found is not None:
            if found.lifecycle_stage == "deleted":
                where = f"MLFLOW_TRACKING_URI={shlex.quote(self._uri)}"
                raise TrackingFailed(
                    f"the MLflow experiment {self._experiment} was deleted",
                    f"Restore it: {where} mlflow experiments restore -x {found.experiment_id}   "
                    "Or let trials to come record into another one with tracking.experiment=NAME.",
                )
            return str(found.experiment_id)
        artifacts = None if self._database is None else (self._database.parent / "artifacts").as_uri()
        try:
            return str(self._client.create_experiment(self._experiment, artifact_location=artifacts))
        except MlflowException:
            found = self._client.get_experiment_by_name(self._experiment)  # another start made it meanwhile
            if found is None:
                raise
            return str(found.experiment_id)


_ORPHAN = "orphan"
"""Tag of a run that was ended without its record; should that turn up, the run is gone on with."""


def _is_over(run: Any) -> bool:
    return run.info.status != "RUNNING" and _ORPHAN not in run.data.tags


_STATUS = {Outcome.finished.value: "FINISHED", Outcome.killed.value: "KILLED"}
"""MLflow's word for an outcome; every other one is FAILED there, and told apart by the tag `outcome`."""


def open_tracker(tracking: TrackingConfig) -> Tracker:
    """The tracker the config asks for; makes the local store if there is none.

    Raises: InvalidInput when the local folder can't be written; TrackingFailed when a server is not reached, or
    the store is locked, damaged, of another version of MLflow or can't be made.
    """
    if tracking.kind is TrackingKind.none:
        return InMemoryTracker()
    _set_up_mlflow()
    if tracking.kind is TrackingKind.server:
        uri = str(tracking.uri)
        check_reachable(uri)
        return MlflowTracker(uri, tracking.experiment, None, look(uri))
    root = check_writable(tracking)
    database = root / "mlflow.db"
    uri = address_of(database)
    with store_errors():
        create_store(database)
        check_database(database)
        check_unlocked(database)
    return MlflowTracker(uri, tracking.experiment, database, look(uri))


def look(uri: str) -> list[str]:
    """Lines that tell how to open a store's UI; {page} in them stands for the page."""
    if uri.startswith(("http://", "https://")):
        return [f"see {without_secrets(uri).rstrip('/')}/{{page}}"]
    return [
        f"mlflow ui --backend-store-uri {shlex.quote(without_secrets(uri))}",
        "then see http://127.0.0.1:5000/{page}",
    ]


def connect(uri: str) -> Any:
    """An MlflowClient of a store that is there.

    Raises: TrackingFailed when there is none, or it is not reached."""
    _set_up_mlflow()
    check_store_exists(uri)
    from mlflow.tracking import MlflowClient

    database = database_of(uri)
    with store_errors():
        if database is not None:
            check_database(database)
        elif uri.startswith(_DATABASES):
            _check_database_answers(uri)
        return MlflowClient(tracking_uri=uri)


_DATABASES = ("postgresql", "mysql", "mssql")


def _check_database_answers(uri: str) -> None:
    """MLflow itself would try for minutes."""
    import sqlalchemy

    try:
        engine = sqlalchemy.create_engine(uri)
    except ValueError as error:  # a port that is no number
        raise TrackingFailed(f"{uri} is no address of a database") from error
    engine.connect().close()
    engine.dispose()


def _set_up_mlflow() -> None:
    """Quiet, and soon done with a server that is away; before MLflow is imported."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # what goes wrong is raised, and said here in a sentence
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    logging.getLogger("alembic").setLevel(logging.WARNING)


def fetch_run(uri: str, run_id: str, files: Sequence[str], to: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Metrics and tags of a run; those of its `files` that are there are put into the folder `to`.

    Raises: TrackingFailed when the store or the run can't be had.
    """
    client = connect(uri)
    with store_errors():
        run = client.get_run(run_id)
        there = {file.path for file in client.list_artifacts(run_id)}
        for name in there & set(files):
            client.download_artifacts(run_id, name, str(to))
    return dict(run.data.metrics), dict(run.data.tags)


def check_store_exists(uri: str) -> None:
    """MLflow itself would make a store where there is none, and call a server that is away for minutes.

    Raises: TrackingFailed."""
    kind, _, place = uri.partition("://")
    if not place:
        raise TrackingFailed(
            f"{uri} is no store's address, as sqlite:////folder/mlruns/mlflow.db or http://127.0.0.1:5000 would be."
        )
    if kind in ("http", "https"):
        check_reachable(uri)
    database = database_of(uri)
    if database is not None and not has_content(database):
        raise TrackingFailed(f"there is no store at {uri}.")


def _tags(tags: dict[str, str]) -> dict[str, str]:
    return {key: _text(value)[:_LONGEST_TAG] for key, value in tags.items()}


def _params(params: dict[str, str]) -> list[Any]:
    from mlflow.entities import Param

    return [Param(key, _text(value)) for key, value in params.items()]


def _text(text: str) -> str:
    """Without what no database takes: halves of characters, as a file name that is no UTF-8 leaves them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
