"""Connect to an existing MLflow store, and read from it by a run's id."""

import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_lab.secrets import without_secrets
from lora_lab.store import saved_view
from lora_lab.store.errors import TrackingFailed, store_errors
from lora_lab.store.local_store import check_database, database_of, has_content
from lora_lab.store.mlflow_names import read_back
from lora_lab.store.tracking_server import check_reachable


def ui_address(uri: str, port: int = 5000) -> str:
    """Return the address of a store's UI: the server's own, or the one that `mlflow ui` opens on this machine."""
    return without_secrets(uri).rstrip("/") if is_server(uri) else f"http://127.0.0.1:{port}"


def is_server(uri: str) -> bool:
    """Return whether a store is a tracking server, which has a UI already."""
    return uri.startswith(("http://", "https://"))


def look(uri: str, page: str) -> list[str]:
    """Return lines that say how to open a page of a store's UI."""
    seen = f"see {ui_address(uri)}/{page}"
    if is_server(uri):
        return [seen]
    return [f"mlflow ui --backend-store-uri {shlex.quote(without_secrets(uri))}", f"then {seen}"]


def connect(uri: str) -> Any:
    """Return an MlflowClient for an existing store.

    Raises: TrackingFailed when there is no store, or it cannot be reached."""
    set_up_mlflow()
    check_store_exists(uri)
    from mlflow.tracking import MlflowClient

    database = database_of(uri)
    with store_errors():
        if database is not None:
            check_database(database)
        elif uri.startswith(_DATABASES):
            _check_database_answers(uri)
        return MlflowClient(tracking_uri=uri)


def tables(uri: str) -> dict[str, str]:
    """Return the page of the UI that lists the trials of an experiment, for each experiment that has any, by its name.

    Raises: TrackingFailed when the store cannot be reached."""
    client = connect(uri)
    with store_errors():
        return {
            one.name: saved_view.runs_page(one.experiment_id, with_view=keep_view(client, one.experiment_id))
            for one in client.search_experiments()
            if client.search_runs([one.experiment_id], "tags.record_id != ''", max_results=1)
        }


def keep_view(client: Any, experiment: str) -> bool:
    """Add the saved view of trials to an experiment that lacks it.

    Returns: whether the experiment has one; a server may not allow its tags to be written."""
    from mlflow.exceptions import MlflowException

    try:
        if saved_view.TAG not in client.get_experiment(experiment).tags:
            client.set_experiment_tag(experiment, saved_view.TAG, saved_view.value())
    except MlflowException:
        return False
    return True


_DATABASES = ("postgresql", "mysql", "mssql")


def _check_database_answers(uri: str) -> None:
    """Raise an error at once when a database does not answer. MLflow itself would try for minutes."""
    import sqlalchemy

    try:
        engine = sqlalchemy.create_engine(uri)
    except ValueError as error:  # a port that is not a number
        raise TrackingFailed(f"{uri} is not the address of a database") from error
    engine.connect().close()
    engine.dispose()


def set_up_mlflow() -> None:
    """Make MLflow quiet, and quick to give up on a server that does not answer.

    Call this before MLflow is imported."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # lora_lab reports each error in one sentence
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")  # a model takes no files from the folder we are started in
    logging.getLogger("alembic").setLevel(logging.WARNING)


def fetch_run(uri: str, run_id: str, files: Sequence[str], to: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Return the metrics and tags of a run. Put those of its `files` that exist into the folder `to`.

    Raises: TrackingFailed when the store or the run is missing or cannot be reached."""
    client = connect(uri)
    with store_errors():
        run = client.get_run(run_id)
        there = {file.path for file in client.list_artifacts(run_id)}
        for name in there & set(files):
            client.download_artifacts(run_id, name, str(to))
    _, tags, metrics = read_back(run.data.params, run.data.tags, run.data.metrics)
    return metrics, tags


def check_store_exists(uri: str) -> None:
    """Raise TrackingFailed where there is no store. MLflow itself would make one, or try a dead server for minutes."""
    kind, _, place = uri.partition("://")
    if not place:
        raise TrackingFailed(
            f"{uri} is not the address of a store, such as sqlite:////folder/mlruns/mlflow.db or http://127.0.0.1:5000."
        )
    if kind in ("http", "https"):
        check_reachable(uri)
    database = database_of(uri)
    if database is not None and not has_content(database):
        raise TrackingFailed(f"there is no store at {uri}.")
