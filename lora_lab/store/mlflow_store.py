"""Write records into MLflow: a local database, or a tracking server."""

import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_lab.config import TrackingConfig
from lora_lab.options import TrackingKind
from lora_lab.outcome import Outcome
from lora_lab.quality.answer_rows import ANSWERS, as_table, read_answers
from lora_lab.store import mlflow_names
from lora_lab.store.description import NOTE, description
from lora_lab.store.errors import SweepUnknown, TrackingFailed, store_errors
from lora_lab.store.local_store import (
    address_of,
    check_database,
    check_unlocked,
    check_writable,
    create_store,
    has_content,
)
from lora_lab.store.mlflow_client import keep_view, look, set_up_mlflow, ui_address
from lora_lab.store.record import ORPHAN, RUNNING, Point, Record
from lora_lab.store.registration import register
from lora_lab.store.saved_view import run_page, runs_page
from lora_lab.store.tracker import InMemoryTracker, Tracker, Which, attempt_in
from lora_lab.store.tracking_server import check_reachable

_METRICS_A_CALL = 1000


class MlflowTracker:
    """A tracker that writes into an MLflow store or server."""

    def __init__(self, uri: str, experiment: str, database: Path | None) -> None:
        """Connect to a store. The experiment is made together with its first run.

        Args:
            uri: MLflow tracking URI.
            experiment: its name.
            database: the local store's file, with its artifacts next to it; None for a server.

        Raises: TrackingFailed.
        """
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

    def deliver(self, record: Record, files: Sequence[Path]) -> str:
        """Find or create the run. Write params, tags, metrics, series and files, and the run's status last."""
        from mlflow.entities import Metric, RunTag

        ended_ms = record.ended_ms or round(time.time() * 1e3)
        points = [Metric(key, value, ended_ms, 0) for key, value in mlflow_names.metrics(record).items()]
        points += _series(record.series)
        with store_errors():
            self._check_present()
            found = self._find(record.id)
            if found is not None and _is_over(found) and not record.is_sweep:
                if attempt_in(record.tags) <= attempt_in(found.data.tags):
                    return str(found.info.run_id)
                # first of all: a delivery that is cut off after this is gone on with
                self._client.update_run(found.info.run_id, status="RUNNING")
            run_id = str(found.info.run_id) if found is not None else self._create(record)
            if found is not None:
                for tag in {ORPHAN, *_OF_AN_END} & found.data.tags.keys() - _tags(record).keys():
                    self._client.delete_tag(run_id, tag)
            tags = [RunTag(key, value) for key, value in _tags(record).items()]
            if not record.is_sweep or found is None or NOTE not in found.data.tags:  # the user may have written one
                tags.append(RunTag(NOTE, _text(description(record))[: mlflow_names.LONGEST_TAG]))
            self._client.log_batch(run_id, params=_params(record), tags=tags)
            self._log(run_id, points)
            for path in files:
                if path.is_dir():
                    self._client.log_artifacts(run_id, str(path), path.name)
                else:
                    self._client.log_artifact(run_id, str(path))
                if path.name == ANSWERS:
                    self._show_table(run_id, path)
            if record.outcome == RUNNING:
                self._client.update_run(run_id, status="RUNNING")  # a sweep that is continued
            else:
                self._client.set_terminated(run_id, _STATUS.get(record.outcome, "FAILED"), ended_ms)
        return run_id

    def extend(self, run_id: str, points: Sequence[Point]) -> None:
        """Add the points. MLflow keeps one of those with the same key, step, time and value."""
        with store_errors():
            self._check_present()
            self._log(run_id, _series(points))

    def add_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Add the tags, each by its own name."""
        from mlflow.entities import RunTag

        with store_errors():
            self._check_present()
            self._client.log_batch(
                run_id, tags=[RunTag(key, _text(text)[: mlflow_names.LONGEST_TAG]) for key, text in tags.items()]
            )

    def register(self, run_id: str, folder: Path, record: Record, name: str) -> None:
        """Store the adapter as a model, and make it a version of the registered one."""
        with store_errors():
            self._check_present()
            register(self._client, run_id, folder, record, name)

    def _log(self, run_id: str, metrics: Sequence[Any]) -> None:
        for start in range(0, len(metrics), _METRICS_A_CALL):
            self._client.log_batch(run_id, metrics=metrics[start : start + _METRICS_A_CALL])

    def _show_table(self, run_id: str, answers: Path) -> None:
        """Add the answers as a table, which MLflow's page of evaluations shows. Its own log_table would add the rows
        again whenever a record is delivered again."""
        name = f"{answers.stem}.json"
        self._client.log_dict(run_id, as_table(read_answers(answers)[0]), name)
        self._client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps([{"path": name, "type": "table"}]))

    def end_orphans(self, gone: Callable[[dict[str, str]], bool]) -> int:
        """Mark runs in the state RUNNING as KILLED when their process is gone. Return how many there were."""
        with store_errors():
            running = self._client.search_runs([self._experiment_id()], "attributes.status = 'RUNNING'")
            orphans = [run.info.run_id for run in running if gone(_tags_of(run))]
            for run_id in orphans:
                self._client.set_tag(run_id, "outcome", Outcome.killed.value)
                self._client.set_tag(run_id, ORPHAN, "its process was gone, and its folder not here")
                self._client.set_terminated(run_id, "KILLED")
        return len(orphans)

    def _check_present(self) -> None:
        """Raise TrackingFailed when a local database was deleted or replaced.

        The old file is still open and would accept records."""
        if self._database is None:
            return
        if not has_content(self._database) or self._database.stat().st_ino != self._inode:
            raise TrackingFailed(f"{self._database} was deleted or replaced since it was opened")
        check_unlocked(self._database)

    def which(self) -> Which:
        """Return the address, and when the store's first experiment was made, which is when the store was made."""
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
        """Return the run of a record; None when there is none.

        A run that was deleted is restored. A sweep's run has trials below it, and more will come."""
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
        # all tags at once, so that a run that a kill leaves here names its process
        tags = _tags(record) | {"record_id": record.id}
        tags |= {"mlflow.source.name": "lora_lab", "mlflow.source.type": "LOCAL"}
        if record.parent is not None:
            parent = self._find(record.parent)
            if parent is None:
                raise SweepUnknown(f"the store does not know the sweep of {record.name}")
            tags["mlflow.parentRunId"] = parent.info.run_id
        run = self._client.create_run(self._experiment_id(), record.started_ms, tags, record.name)
        return str(run.info.run_id)

    def where(self, run_id: str) -> list[str]:
        """Return lines with the run, the UI's command and two of its pages: the run, and the table of all trials."""
        with store_errors():
            experiment = self._experiment_id()
            table = runs_page(experiment, with_view=keep_view(self._client, experiment))
        return [
            f"run {run_id} of experiment {self._experiment}",
            *look(self._uri, run_page(experiment, run_id)),
            f"all trials: {ui_address(self._uri)}/{table}",
        ]

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(self._experiment)
        if found is not None:
            if found.lifecycle_stage == "deleted":
                where = f"MLFLOW_TRACKING_URI={shlex.quote(self._uri)}"
                raise TrackingFailed(
                    f"the MLflow experiment {self._experiment} was deleted",
                    f"Restore it: {where} mlflow experiments restore -x {found.experiment_id}   "
                    "Or record later trials into another one with tracking.experiment=NAME.",
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


def _series(points: Sequence[Point]) -> list[Any]:
    from mlflow.entities import Metric

    return [Metric(mlflow_names.SERIES.get(p.key, p.key), p.value, p.t_ms, p.step) for p in points]


_OF_AN_END = ("reason", "step", "absent", "warnings")
"""Tags of a trial's end. A job that goes on after it may have none of them."""


def _tags_of(run: Any) -> dict[str, str]:
    return mlflow_names.read_back({}, run.data.tags, {})[1]


def _is_over(run: Any) -> bool:
    return run.info.status != "RUNNING" and ORPHAN not in run.data.tags


_STATUS = {Outcome.finished.value: "FINISHED", Outcome.killed.value: "KILLED"}
"""MLflow's word for an outcome. Every other one is FAILED there, and the tag `outcome` distinguishes them."""


def open_tracker(tracking: TrackingConfig) -> Tracker:
    """Return the tracker that the config asks for. Make the local store if there is none.

    Raises: InvalidInput when the local folder cannot be written; TrackingFailed when a server is not reached, or the
    store is locked, damaged, of another version of MLflow or cannot be made."""
    if tracking.kind is TrackingKind.none:
        return InMemoryTracker()
    set_up_mlflow()
    if tracking.kind is TrackingKind.server:
        uri = str(tracking.uri)
        check_reachable(uri)
        return MlflowTracker(uri, tracking.experiment, None)
    root = check_writable(tracking)
    database = root / "mlflow.db"
    uri = address_of(database)
    with store_errors():
        create_store(database)
        check_database(database)
        check_unlocked(database)
    return MlflowTracker(uri, tracking.experiment, database)


def _tags(record: Record) -> dict[str, str]:
    return {key: _text(text)[: mlflow_names.LONGEST_TAG] for key, text in mlflow_names.tags(record).items()}


def _params(record: Record) -> list[Any]:
    from mlflow.entities import Param

    return [Param(key, _text(text)) for key, text in mlflow_names.params(record).items()]


def _text(text: str) -> str:
    """Return a text that every database accepts. Halves of characters, from a file name that is not UTF-8, are
    escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
