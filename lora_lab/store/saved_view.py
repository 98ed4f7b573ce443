"""MLflow's table of runs with the columns that tell trials apart: a saved view, kept as a tag of the experiment."""

import json
import time

KEY = "lora_lab"
TAG = f"mlflow.sharedViewState.{KEY}"
"""MLflow's page finds it by viewStateShareKey=lora_lab, and lists it under "Saved views"."""

_NAME = "lora_lab: trials"
_COLUMNS = (
    "tags.`outcome`",
    "params.`model`",
    "params.`optimizer`",
    "params.`precision`",
    "params.`engine`",
    "params.`batch_size`",
    "params.`seq_len`",
    "metrics.`throughput/tokens_per_second`",
    "metrics.`vram/peak_device_gib`",
    "metrics.`energy/joules_per_token`",
    "metrics.`loss/eval`",
    "attributes.`Duration`",
)


def value() -> str:
    """Return the tag's text, as MLflow 3.17 writes and reads it."""
    state = {
        # trials alone: sweeps have no such param. MLflow then shows all in one list and nests none
        "searchFilter": "params.batch_size != ''",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "selectedColumns": list(_COLUMNS),
        "columnOrder": list(_COLUMNS),
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
