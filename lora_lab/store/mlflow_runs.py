"""Runs read from a store by MLflow's client. Runs that were deleted there are left out."""

import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_lab.config import InvalidInput
from lora_lab.quality.answer_rows import ANSWERS, AnswerRow, read_answers
from lora_lab.secrets import without_secrets
from lora_lab.store.errors import store_errors
from lora_lab.store.mlflow_client import connect
from lora_lab.store.mlflow_names import SERIES as NAMES
from lora_lab.store.mlflow_names import read_back
from lora_lab.store.run_checks import printable
from lora_lab.store.runs import Readings, Run

_PARENT = "mlflow.parentRunId"
_RUNS_A_CALL = 1000


class MlflowRuns:
    """The runs of one store."""

    def __init__(self, uri: str, experiment: str | None) -> None:
        """Connect to the store.

        Args:
            uri: MLflow tracking URI.
            experiment: read only the runs of this experiment; None for all.

        Raises: TrackingFailed.
        """
        self._uri = uri
        self._experiment = experiment
        self._client = connect(uri)
        self.place = f"the store {without_secrets(uri)}" + (f" (experiment {experiment})" if experiment else "")

    def runs(self) -> Iterable[Run]:
        """Read every run of lora_lab."""
        # oldest first: a run that is added meanwhile comes last, and moves no other run to another page
        # MLflow fails on a run without a start, and would then return none of the others
        ours = "tags.record_id != '' and attributes.start_time > 0"
        asked = {"filter_string": ours, "order_by": ["attributes.start_time ASC"]}
        ids = self._experiment_ids()
        with store_errors():
            return [_run(run) for run in _pages(self._client.search_runs, experiment_ids=ids, **asked)]

    def series(self, run_id: str, keys: Sequence[str]) -> dict[str, Readings]:
        """Read these series of a run. Those that it does not have are left out or empty."""
        found: dict[str, Readings] = {key: [] for key in keys}
        for key in keys:
            for name in dict.fromkeys((NAMES.get(key, key), key)):  # older versions wrote it under its own key
                with store_errors():
                    points = self._client.get_metric_history(run_id, name)
                found[key] += [(point.timestamp, point.step, _number(point.value)) for point in points]
        return found

    def answers(self, run_id: str) -> list[AnswerRow]:
        """Fetch a trial's answers; none where the run has none."""
        with store_errors(), tempfile.TemporaryDirectory() as place:
            if any(file.path == ANSWERS for file in self._client.list_artifacts(run_id)):
                return read_answers(Path(self._client.download_artifacts(run_id, ANSWERS, place)))[0]
        return []

    def store_of(self, run_id: str) -> str:
        """Return this store's address."""
        return self._uri

    def _experiment_ids(self) -> list[str]:
        with store_errors():
            names = {str(one.experiment_id): one.name for one in _pages(self._client.search_experiments)}
        chosen = [key for key, name in names.items() if self._experiment in (None, name)]
        if not chosen:
            there = printable(", ".join(sorted(map(str, names.values()))))
            raise InvalidInput(f"{self.place}: there is no such experiment. The experiments are: {there}.")
        return chosen


def _pages(search: Any, **asked: Any) -> Iterator[Any]:
    page = search(max_results=_RUNS_A_CALL, **asked)
    yield from page
    while page.token:
        page = search(max_results=_RUNS_A_CALL, page_token=page.token, **asked)
        yield from page


def _run(run: Any) -> Run:
    params, tags, metrics = read_back(run.data.params, run.data.tags, run.data.metrics)
    return Run(
        run_id=run.info.run_id,
        above=tags.get(_PARENT),
        name=run.info.run_name or "",
        started_ms=run.info.start_time,
        params=params,
        metrics={key: _number(value) for key, value in metrics.items()},
        tags={key: text for key, text in tags.items() if not str(key).startswith("mlflow.")},
    )


def _number(value: float) -> float:
    """Return infinity for the largest number: a store that knows no infinity keeps that number instead.

    A value that is not a number is returned unchanged. It is left out later."""
    if not isinstance(value, int | float):
        return value
    return math.copysign(math.inf, value) if abs(value) == sys.float_info.max else value
