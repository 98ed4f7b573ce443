"""Run a list of trials in one parent process and collect what each left behind.

Every cell goes through the same composition and the same session as the command line does.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import open_dict

from lora_lab.composition.compose import CONF, load, register_schema
from lora_lab.composition.keys import GROUPS
from lora_lab.config import TrialConfig
from lora_lab.trial.session import Request, run_session


def compose_cell(overrides: Sequence[str]) -> TrialConfig:
    """The config that a command line with these overrides has."""
    return _compose(overrides)[0]


def _compose(overrides: Sequence[str]) -> tuple[TrialConfig, dict[str, str]]:
    register_schema()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("config", overrides=list(overrides), return_hydra_config=True)
    choices = {group: str(composed.hydra.runtime.choices[group]) for group in GROUPS}
    with open_dict(composed):
        del composed["hydra"]
    return load(composed), choices


def run_cell(overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """One trial; returns its record as written to record.json."""
    config, choices = _compose(overrides)
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run of the same benchmark
    run_session(
        Request(config=config, choices=choices, command=f"python -m lora_lab {' '.join(overrides)}", folder=folder)
    )
    record: dict[str, Any] = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    # where it lay and who ran it on that machine tells nobody anything
    record["tags"] = {k: v for k, v in record["tags"].items() if k != "folder" and not k.startswith("process.")}
    return record


COLUMNS = (
    ("tokens/s", "throughput/tokens_per_second", "{:,.0f}"),
    ("s per 10k tokens", "throughput/seconds_per_10k_tokens", "{:.2f}"),
    ("step s (median)", "throughput/step_seconds_p50", "{:.4f}"),
    ("loading GiB", "vram/load_allocated_gib", "{:.2f}"),
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
    head.insert(2, "attention kernel")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, record in rows:
        kernel = record["tags"].get("ran.attention_kernel", "-")
        figures = [form.format(record["metrics"][key]) if key in record["metrics"] else "-" for _, key, form in COLUMNS]
        lines.append("| " + " | ".join([name, record["outcome"], kernel, *figures]) + " |")
    return "\n".join(lines)


def provenance(record: dict[str, Any], command: str) -> dict[str, str]:
    """Where figures come from: command, commit, card, versions."""
    tags = record["tags"]
    keep = {k: v for k, v in tags.items() if k.startswith(("version.", "device", "machine."))}
    return {"command": command, "commit": os.environ.get("LORA_LAB_COMMIT", tags["commit"]), **keep}


def write_report(out: Path, name: str, title: str, origin: dict[str, str], text: str, content: dict[str, Any]) -> None:
    """NAME.md for people: title, origin, text; and NAME.json: origin and content."""
    head = "\n".join(f"- {key}: {value}" for key, value in origin.items())
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(f"# {title}\n\n{head}\n\n{text}\n", encoding="utf-8")
    whole = json.dumps({"origin": origin, **content}, indent=1)
    (out / f"{name}.json").write_text(whole + "\n", encoding="utf-8")


def write(out: Path, name: str, title: str, command: str, rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Write NAME.md for people and NAME.json with everything; returns the table.

    LORA_LAB_COMMIT names the commit on a machine that has the files but not the history.
    """
    origin = provenance(rows[0][1], command)
    head = "\n".join(f"- {key}: {value}" for key, value in origin.items())
    text = table(rows)
    losses = [
        f"| {cell} | {record['metrics']['loss/eval_before']:.4f} | {record['metrics']['loss/eval']:.4f} |"
        for cell, record in rows
        if "loss/eval" in record["metrics"]
    ]
    if losses:
        text += "\n\n| cell | held-out loss before | after |\n|---|---|---|\n" + "\n".join(losses)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(f"# {title}\n\n{head}\n\n{text}\n", encoding="utf-8")
    cells = ",\n".join(json.dumps(row) for row in rows)
    written = f'{{"origin": {json.dumps(origin, indent=1)},\n"cells": [\n{cells}\n]}}\n'
    (out / f"{name}.json").write_text(written, encoding="utf-8")
    return text
