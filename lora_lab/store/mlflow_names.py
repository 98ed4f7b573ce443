"""The names that the parts of a record have in MLflow, and the way back. MLflow's pages suit few names, not many.

The name of a series decides where MLflow shows it. A section that begins with a capital comes before every other. A
name that begins with system/ is on the page of system metrics. A trial's settings share one tag, except those that were
chosen. Reasons of absence, versions and other facts share tags too. Runs of older versions have a separate name for
each.
"""

import json
from collections.abc import Mapping
from typing import Any

from lora_lab.store.record import Record

SERIES = {
    "step/loss": "Steps/loss",
    "step/seconds": "Steps/seconds",
    "step/tokens_per_second": "Steps/tokens_per_second",
    "step/learning_rate": "Steps/learning_rate",
    "step/power_watts": "Steps/power_watts",
    "heldout/loss": "Steps/heldout_loss",
    "card/power_watts": "system/gpu_0_power_usage_watts",
    "card/used_gib": "system/gpu_0_memory_usage_gib",
    "card/celsius": "system/gpu_0_temperature_celsius",
    "card/sm_mhz": "system/gpu_0_sm_clock_mhz",
}
"""A record's series and their names in MLflow; gpu_0 is the trial's card, whatever its number in the machine."""

_OURS = {name: key for key, name in SERIES.items()}

_FIRST = (
    "throughput/tokens_per_second",
    "vram/peak_device_gib",
    "energy/joules_per_token",
    "loss/eval",
    "loss/eval_before",
    "throughput/gpu_busy_share",
)
"""The first metrics to log: MLflow lists and compares metrics in the order in which they were logged."""

_SHARED = {
    "absent.": "absent",
    "ran.": "ran",
    "version.": "versions",
    "process.": "process",
    "machine.": "machine",
    "device.": "device_facts",
}
"""Beginnings of tags that share one tag in MLflow, and the name of that tag."""

_SETTINGS = "settings"
LONGEST_TAG = 5000


def metrics(record: Record) -> dict[str, float]:
    """Return the figures in MLflow's order. Those that people look for come first."""
    first = {key: record.metrics[key] for key in _FIRST if key in record.metrics}
    return first | record.metrics


def params(record: Record) -> dict[str, str]:
    """Return the settings that are params in MLflow: those that were chosen, and those that do not fit into the tag."""
    shared = _shared_settings(record)
    return {key: text for key, text in record.params.items() if key not in shared}


def tags(record: Record) -> dict[str, str]:
    """Return the tags under MLflow's names. A tag that does not fit into the shared one keeps its own name."""
    found = dict(record.tags)
    for beginning, name in _SHARED.items():
        by_reason = name == "absent"
        members = {key.removeprefix(beginning): text for key, text in record.tags.items() if key.startswith(beginning)}
        members = _fitting(members, by_reason)
        if members and name not in record.tags:
            for key in members:
                del found[f"{beginning}{key}"]
            found[name] = _written(members, by_reason)
    shared = _shared_settings(record)
    return found | ({_SETTINGS: _written(shared)} if shared else {})


def read_back(
    params: Mapping[str, Any], tags: Mapping[str, Any], metrics: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return a run's params, tags and metrics under the names of a record, whichever version wrote the run."""
    names = {name: beginning for beginning, name in _SHARED.items()}
    settings: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    for key, text in tags.items():
        members = _members(text) if key in names or key == _SETTINGS else None
        if members is None:
            plain[key] = text
        elif key == _SETTINGS:
            settings = members
        else:
            shared |= {f"{names[key]}{member}": value for member, value in members.items()}
    # a sweep that an older version began and this one continued has both: the shared ones are newer
    return settings | dict(params), plain | shared, {_OURS.get(key, key): value for key, value in metrics.items()}


def _shared_settings(record: Record) -> dict[str, str]:
    if not record.chosen:
        return {}
    return _fitting({key: text for key, text in record.params.items() if key not in record.chosen})


def _fitting(members: dict[str, str], by_reason: bool = False) -> dict[str, str]:
    """Return as many members as fit into one tag, the short ones first."""
    kept = dict(members)
    for key in sorted(members, key=lambda key: -len(key + members[key])):
        if len(_written(kept, by_reason)) <= LONGEST_TAG:
            break
        del kept[key]
    return kept


def _written(members: Mapping[str, str], by_reason: bool = False) -> str:
    if not by_reason:
        return json.dumps(members)
    reasons: dict[str, list[str]] = {}
    for key, reason in members.items():
        reasons.setdefault(reason, []).append(key)
    return json.dumps(reasons)


def _members(text: Any) -> dict[str, str] | None:
    """Return the members of a shared tag; None when lora_lab did not write it."""
    try:
        found = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    members: dict[str, str] = {}
    for key, value in found.items():
        names = value if isinstance(value, list) else None
        for member, said in [(key, value)] if names is None else [(name, key) for name in names]:
            if not isinstance(member, str) or not isinstance(said, str):
                return None
            members[member] = said
    return members
