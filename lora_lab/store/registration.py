"""Register a trained model in MLflow's model registry, by MLflow's general flavour (pyfunc).

MLflow's flavour for transformers takes a loaded pipeline, so it would load the weights once more; it asks the hub for
them, or remembers a folder, and does not know of 4 bit. This one stores what was trained and the config of
its trial, and never the base model's weights: lora_lab itself loads those as the trial had them (registered.py)."""

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lora_lab
from lora_lab.base_weights import WEIGHTS, trained_in
from lora_lab.store.record import KINDS, Record
from lora_lab.store.tracker import ATTEMPT, attempt_in

_LOADER = "lora_lab.registered"
_RECORD = "record_id"
_MOST_TOKENS = 256
"""Of an answer, unless the caller asks for another number."""


def register(client: Any, run_id: str, folder: Path, record: Record, name: str) -> None:
    """Make a version of the registered model `name` from what a trial has trained. Doing it twice is the same as once.

    Args:
        client: an MlflowClient.
        folder: the trial's.

    Raises: MlflowException, OSError, and what else a store raises."""
    attempt = str(attempt_in(record.tags))
    for version in client.search_model_versions(f"run_id = '{run_id}'"):
        if version.name == name and version.tags.get(ATTEMPT) == attempt:
            return
    stored = f"model_{attempt}"  # a job that goes on has other weights in the end
    with tempfile.TemporaryDirectory() as place:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of type hints in MLflow's own modules, and that there is no example
            _write(Path(place), folder, record)
        client.log_artifacts(run_id, str(Path(place) / "model"), stored)
    _create_name(client, name)
    source = f"{client.get_run(run_id).info.artifact_uri.rstrip('/')}/{stored}"
    client.create_model_version(name, source, run_id, tags={ATTEMPT: attempt, _RECORD: record.id}, await_creation_for=0)


def _write(place: Path, folder: Path, record: Record) -> None:
    """Write the model as MLflow stores one into `place`/model."""
    from mlflow import pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    data = place / "trial"
    trained = trained_in(folder)
    if trained is None:
        raise FileNotFoundError(f"{folder} holds nothing that was trained")
    shutil.copytree(trained, data / trained.name)
    shutil.copy(folder / "config.yaml", data)
    if (folder / WEIGHTS).is_file():
        shutil.copy(folder / WEIGHTS, data)
    text = Schema([ColSpec(DataType.string)])
    pyfunc.save_model(
        str(place / "model"),
        loader_module=_LOADER,
        data_path=str(data),
        signature=ModelSignature(
            inputs=text,
            outputs=text,
            params=ParamSchema([ParamSpec("max_new_tokens", DataType.long, _MOST_TOKENS)]),
        ),
        model_config={"rows": record.tags.get(KINDS, "unknown")},
        pip_requirements=[f"lora_lab=={lora_lab.__version__}"],
    )


def _create_name(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
