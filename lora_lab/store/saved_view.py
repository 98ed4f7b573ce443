"""MLflow's saved view of trials: a table with the columns that distinguish them, kept as a tag of the experiment."""

import json
import time

KEY = "lora_lab"
TAG = f"mlflow.sharedViewState.{KEY}"
"""MLflow's page finds it by viewStateShareKey=lora_lab, and lists it under "Saved views"."""

_NAME = "lora_lab: trials"
_SPEED = "throughput/tokens_per_second"
_COLUMNS = {
    "tags.`outcome`": 100,
    f"metrics.`{_SPEED}`": 200,
    "metrics.`vram/peak_device_gib`": 160,
    "metrics.`energy/joules_per_token`": 175,
    "metrics.`loss/eval`": 100,
    "params.`optimizer`": 110,
    "params.`precision`": 80,
    "params.`batch_size`": 80,
    "params.`seq_len`": 80,
    "params.`engine`": 80,
    "params.`model`": 120,
}
"""The columns in order, with their widths in pixels."""


def value() -> str:
    """Return the tag's text, as MLflow 3.17 writes and reads it."""
    state = {
        "searchFilter": "params.batch_size != ''",  # only trials: a sweep has no such param
        "orderByKey": f"metrics.`{_SPEED}`",  # sorted by time, MLflow would fold trials into their sweep
        "orderByAsc": False,
        "selectedColumns": list(_COLUMNS),
        "columnOrder": list(_COLUMNS),
        "columnWidths": _COLUMNS,
    }
    now = round(time.time() * 1e3)
    return json.dumps({"name": _NAME, "createdAt": now, "updatedAt": now, "state": json.dumps(state)})


def runs_page(experiment: str, with_view: bool) -> str:
    """Return the address, within the UI, of an experiment's runs."""
    view = f"viewStateShareKey={KEY}&" if with_view else ""
    return f"#/experiments/{experiment}/runs?{view}workflowType=machine_learning"


def run_page(experiment: str, run_id: str, tab: str = "") -> str:
    """Return the address, within the UI, of a run, or of one of its tabs."""
    page = "/".join(filter(None, [f"#/experiments/{experiment}/runs/{run_id}", tab]))
    return f"{page}?workflowType=machine_learning"
