"""Run a list of trials in one parent process and collect what each left behind.

Every cell goes through the same composition and the same session as the command line does.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import open_dict

from lora_lab.compose import CONF, GROUPS, load, register_schema
from lora_lab.session import Request, run_session


def run_cell(overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """One trial; returns its record as written to record.json."""
    register_schema()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("config", overrides=list(overrides), return_hydra_config=True)
    choices = {group: str(composed.hydra.runtime.choices[group]) for group in GROUPS}
    with open_dict(composed):
        del composed["hydra"]
    request = Request(config=load(composed), choices=choices, overrides=list(overrides), folder=folder)
    run_session(request)
    record: dict[str, Any] = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    record.pop("folder")  # where it lay on that machine tells nobody anything
    return record


COLUMNS = (
    ("tokens/s", "throughput/tokens_per_second", "{:,.0f}"),
    ("s per 10k tokens", "throughput/seconds_per_10k_tokens", "{:.2f}"),
    ("step s (median)", "throughput/step_seconds_p50", "{:.4f}"),
    ("allocated GiB", "vram/peak_allocated_gib", "{:.2f}"),
    ("reserved GiB", "vram/peak_reserved_gib", "{:.2f}"),
    ("card GiB", "vram/peak_device_gib", "{:.2f}"),
    ("J/token", "energy/joules_per_token", "{:.4f}"),
    ("mean W", "energy/mean_power_watts", "{:.0f}"),
    ("window s", "window/seconds", "{:.1f}"),
)


def table(rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """A Markdown table of named records."""
    head = ["cell", "outcome", *(title for title, _, _ in COLUMNS)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, record in rows:
        figures = [form.format(record["metrics"][key]) if key in record["metrics"] else "-" for _, key, form in COLUMNS]
        lines.append("| " + " | ".join([name, record["outcome"], *figures]) + " |")
    return "\n".join(lines)


def provenance(records: Sequence[dict[str, Any]], commit: str) -> dict[str, str]:
    """Where figures come from: card, versions, commit, command."""
    tags = records[0]["tags"]
    keep = {k: v for k, v in tags.items() if k.startswith(("version.", "device", "machine."))}
    module = Path(sys.argv[0]).stem
    return {"command": " ".join(["python -m", f"benchmarks.{module} OUT", *sys.argv[2:]]), "commit": commit, **keep}


def checked_out_commit() -> str:
    """The commit these figures were measured at; 'unknown' outside a clone."""
    if "LORA_LAB_COMMIT" in os.environ:  # on a machine that has the files but not the history
        return os.environ["LORA_LAB_COMMIT"]
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
