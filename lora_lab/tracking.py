"""Where results are kept: the Tracker protocol, MLflow, and one in memory. The only importer of mlflow."""

import contextlib
import itertools
import logging
import os
import shlex
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from lora_lab.config import RefusedInput, TrackingConfig, TrackingKind
from lora_lab.outcome import Outcome
from lora_lab.records import Record, without_secrets

_METRICS_A_CALL = 1000
_SERVER_SECONDS = 3.0
_LONGEST_TAG = 5000


class TrackingFailed(RuntimeError):
    """The store did not take a record. The trial's files are still in its folder."""


class Tracker(Protocol):
    """Takes the record of each trial."""

    def begin(self, record: Record) -> str:
        """The trial is under way: name, params and first tags. Returns an id.

        Raises: TrackingFailed."""

    def finish(self, run_id: str, record: Record) -> None:
        """The trial is over: everything.

        Raises: TrackingFailed."""

    def discard(self, run_id: str) -> None:
        """The trial turned out to be refused input: leave no run behind.

        Raises: TrackingFailed."""

    def where(self, run_id: str) -> list[str]:
        """Lines that tell a person where the run is and how to look at it."""


class InMemoryTracker:
    """Keeps records in a list: for tests, and for tracking=none, where the trial's folder is the record."""

    def __init__(self) -> None:
        self.begun: dict[str, Record] = {}
        self.finished: dict[str, Record] = {}
        self._numbers = itertools.count()

    def begin(self, record: Record) -> str:
        """Remember the record."""
        run_id = str(next(self._numbers))
        self.begun[run_id] = record
        return run_id

    def finish(self, run_id: str, record: Record) -> None:
        """Remember that it is complete."""
        self.finished[run_id] = record

    def discard(self, run_id: str) -> None:
        """Forget the record."""
        del self.begun[run_id]

    def where(self, run_id: str) -> list[str]:
        """Not in any store."""
        return ["recorded in no store (tracking=none)"]


class MlflowTracker:
    """Records into an MLflow store or server."""

    def __init__(self, uri: str, experiment: str, artifacts: str | None, look: list[str]) -> None:
        """Connect to a store; an experiment is made when the first run begins.

        Args:
            uri: MLflow tracking URI.
            experiment: its name.
            artifacts: where a new experiment keeps files; None leaves it to the server.
            look: lines that tell how to open the UI; {page} becomes the runs' page.
        """
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        self._experiment = experiment
        self._artifacts = artifacts
        self._look = look

    def begin(self, record: Record) -> str:
        """Create the run as RUNNING, with its params."""
        with _store_errors():
            tags = {"mlflow.source.name": "lora_lab", "mlflow.source.type": "LOCAL", **_tags(record.tags)}
            run = self._client.create_run(self._experiment_id(), run_name=record.name, tags=tags)
            self._client.log_batch(run.info.run_id, params=_params(record.params))
            return str(run.info.run_id)

    def finish(self, run_id: str, record: Record) -> None:
        """Add tags, metrics, series and files; set the run's status."""
        from mlflow.entities import Metric, RunTag

        ended_ms = round(time.time() * 1e3)
        points = [Metric(p.key, p.value, p.t_ms, p.step) for p in record.series]
        points += [Metric(key, value, ended_ms, 0) for key, value in record.metrics.items()]
        with _store_errors():
            self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in _tags(record.tags).items()])
            for start in range(0, len(points), _METRICS_A_CALL):
                self._client.log_batch(run_id, metrics=points[start : start + _METRICS_A_CALL])
            if record.folder is not None:
                self._client.log_artifacts(run_id, str(record.folder))
            self._client.set_terminated(run_id, status=_STATUS.get(record.outcome, "FAILED"))

    def discard(self, run_id: str) -> None:
        """Delete the run (MLflow keeps deleted runs in its trash)."""
        with _store_errors():
            self._client.set_terminated(run_id, status="FAILED")
            self._client.delete_run(run_id)

    def where(self, run_id: str) -> list[str]:
        """The run, the UI's command, and the page with the runs (MLflow opens on another one)."""
        with _store_errors():
            page = f"#/experiments/{self._experiment_id()}/runs?workflowType=machine_learning"
        return [f"run {run_id} of experiment {self._experiment}", *(ln.replace("{page}", page) for ln in self._look)]

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(self._experiment)
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(self._experiment, artifact_location=self._artifacts))
        except MlflowException:
            found = self._client.get_experiment_by_name(self._experiment)  # another start made it meanwhile
            if found is None:
                raise
            return str(found.experiment_id)


_STATUS = {Outcome.finished.value: "FINISHED", Outcome.killed.value: "KILLED"}
"""MLflow's word for an outcome; every other one is FAILED there, and told apart by the tag `outcome`."""


def open_tracker(tracking: TrackingConfig) -> Tracker:
    """The tracker the config asks for; makes the local store if there is none.

    Raises: RefusedInput when the local folder can't be written; TrackingFailed when a server is not reached.
    """
    if tracking.kind is TrackingKind.none:
        return InMemoryTracker()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if tracking.kind is TrackingKind.server:
        uri = str(tracking.uri)
        _refuse_unreachable(uri)
        return MlflowTracker(uri, tracking.experiment, None, [f"see {without_secrets(uri).rstrip('/')}/{{page}}"])
    root = refuse_unwritable(tracking)
    database = root / "mlflow.db"
    uri = f"sqlite:///{database}"
    _create_store(database)
    look = [f"mlflow ui --backend-store-uri {shlex.quote(uri)}", "then see http://127.0.0.1:5000/{page}"]
    return MlflowTracker(uri, tracking.experiment, (root / "artifacts").as_uri(), look)


def refuse_unwritable(tracking: TrackingConfig) -> Path:
    """The local store's folder, made if missing.

    Raises: RefusedInput when nothing can be written there.
    """
    root = Path(tracking.root).resolve()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise RefusedInput(
            f"tracking.root={tracking.root}: nothing can be written to {root} ({error.strerror}). "
            "Give another folder with tracking.root=FOLDER, or use tracking=none."
        ) from error
    return root


def _refuse_unreachable(uri: str) -> None:
    """MLflow itself would try for minutes."""
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_SERVER_SECONDS).close()
    except urllib.error.HTTPError:
        return  # something answers; whether it takes records is seen when it is given one
    except (OSError, ValueError) as error:
        raise TrackingFailed(f"the tracking server {without_secrets(uri)} was not reached ({error})") from error


def _create_store(database: Path) -> None:
    """Make a new store under another name and move it into place whole: two first starts at once, or a
    kill while its tables are made, would otherwise leave a store that never opens again."""
    if database.exists():
        return
    with FileLock(f"{database}.lock"):
        if database.exists():
            return
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        with tempfile.TemporaryDirectory(dir=database.parent) as folder:
            fresh = Path(folder) / database.name
            store = SqlAlchemyStore(f"sqlite:///{fresh}", (database.parent / "artifacts").as_uri())
            store.engine.dispose()
            os.rename(fresh, database)


@contextlib.contextmanager
def _store_errors() -> Iterator[None]:
    """Whatever a store can raise, as TrackingFailed."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise TrackingFailed(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error


def _tags(tags: dict[str, str]) -> dict[str, str]:
    return {key: value[:_LONGEST_TAG] for key, value in tags.items()}


def _params(params: dict[str, str]) -> list[Any]:
    from mlflow.entities import Param

    return [Param(key, value) for key, value in params.items()]
