"""The files of results: read with today's names, joined, written, and put into the docs."""

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.peers.plan import TUTORIAL, UNSLOTH, UNSLOTH_NO_CHECKPOINTING, Cell
from benchmarks.peers.table import ahead_after, median, ratios, table
from benchmarks.reports import RESULTS, markdown, write_report

_FORMAT = 2
SUMMARISED = {
    "Qwen2.5-1.5B": "h200/peers_qlora_qwen2_5_1_5b",
    "Llama-3.1-8B": "h200/peers_qlora_llama3_1_8b",
}
"""The results in README.md."""
_BUSY = 0.75
"""Below this share of the plain step the GPU waits for the host: the report calls that host-bound."""
COLUMNS = {
    "plain": "plain HF",
    "liger": "HF + Liger",
    "unsloth": "Unsloth",
    UNSLOTH_NO_CHECKPOINTING: "Unsloth, no checkpointing",
    "graph": "`engine=graph`",
}

Content = dict[str, Any]


def empty(method: str, model: str) -> Content:
    """Return what a file has before any cell."""
    return {"format": _FORMAT, "method": method, "model": model, "origins": {}, "cells": {}}


def file_of(out: Path, content: Content) -> Path:
    """Return where results of this method and model are stored in a folder."""
    return out / f"peers_{content['method']}_{content['model']}.json"


def read(path: Path) -> Content:
    """Return a file's content, without its `origin`.

    In files of before, `plain` and `liger` raised embeddings and head to fp32 under QLoRA, and Unsloth had its
    checkpointing only in cells that end in c. They are returned under today's names.
    """
    stored: Content = json.loads(path.read_text(encoding="utf-8"))
    del stored["origin"]
    if "format" not in stored:
        qlora = stored["method"] == "qlora"
        stored["cells"] = {cell: _renamed(Cell.parse(cell), found, qlora) for cell, found in stored["cells"].items()}
    return stored


def _renamed(cell: Cell, results: dict[str, Any], qlora: bool) -> dict[str, Any]:
    names = {"plain": TUTORIAL, "liger": "liger_tutorial"} if qlora else {}
    if not cell.checkpointing:
        names[UNSLOTH] = UNSLOTH_NO_CHECKPOINTING
    return {names.get(name, name): result for name, result in results.items()}


def joined(contents: list[Content]) -> Content:
    """Return the cells of several files as one; of a cell that several have, the last.

    Raises: SystemExit for files of different methods, models or formats.
    """
    kinds = {(content["method"], content["model"], content.get("format")) for content in contents}
    if len(kinds) != 1:
        raise SystemExit(f"these files are of different methods, models or formats, so they stay apart: {kinds}")
    whole = dict(contents[0])
    whole["cells"] = {cell: found for content in contents for cell, found in content["cells"].items()}
    whole["origins"] = {cell: origin for content in contents for cell, origin in content["origins"].items()}
    return whole


def write(path: Path, content: Content) -> str:
    """Write the file and its page; return the page's text."""
    text = _text(content)
    title = f"Fine-tuning stacks in turns: {content['method']}, {content['model']}"
    last: dict[str, str] = [*content["origins"].values()][-1]
    write_report(path.parent, path.stem, title, last, text, content)
    return text


def write_page(path: Path) -> str:
    """Make the page of a stored file again, and leave the file as it is; return the page's text."""
    before = path.read_bytes()
    text = write(path, read(path))
    path.write_bytes(before)
    return text


def _text(content: Content) -> str:
    return f"{_origins(content)}\n\n{table(content['cells'])}\n\n{_versions(content)}"


def _origins(content: Content) -> str:
    """Return which card, date and commit the cells are of, and the commands."""
    cells: dict[str, list[str]] = {}
    for cell, origin in content["origins"].items():
        date = f", {origin['date']}" if "date" in origin else ""
        note = f" ({origin['note']})" if "note" in origin else ""
        where = f"{origin['device']}{date}, commit {origin['commit'][:7]}{note}: `{origin['command']}`"
        cells.setdefault(where, []).append(cell)
    return "\n".join(f"- {', '.join(names)}: {where}" for where, names in cells.items())


def _versions(content: Content) -> str:
    versions = {
        f"{package} {version}"
        for results in content["cells"].values()
        for result in results.values()
        for package, version in result.get("versions", {}).items()
    }
    return f"Versions in the contenders' processes: {', '.join(sorted(versions))}."


def page(name: str) -> str:
    """Return the text of a stored file, by its path below results/ without the ending."""
    return _text(read(RESULTS / f"{name}.json"))


def summary() -> str:
    """Return the table of README.md: every cell's contenders by tokens/s and memory, both models."""
    lines = []
    for model, name in SUMMARISED.items():
        content = read(RESULTS / f"{name}.json")
        for cell, found in content["cells"].items():
            columns = [_speed_and_memory(found.get(each)) for each in COLUMNS]
            lines.append([model, cell, str(_rounds(found)), *columns])
    heads = ["model", "shape", "rounds", *COLUMNS.values()]
    origins = [origin for name in SUMMARISED.values() for origin in read(RESULTS / f"{name}.json")["origins"].values()]
    where = sorted({f"{each['device']}, {each['date']}, commit {each['commit'][:7]}" for each in origins})
    units = "Tokens per second, median; GiB allocated in the window."
    notes = "".join(f" Meanwhile, {note}." for note in sorted({each["note"] for each in origins if "note" in each}))
    return f"{markdown(heads, lines)}\n\n{units} {'; '.join(where)}.{notes}\n\n{_gains()}"


def _gains() -> str:
    """Return by what factor graph is faster where no stack waits for the host, and when its compilation has paid."""
    plain, unsloth, first, ahead = [], [], [], []
    for name in SUMMARISED.values():
        for found in read(RESULTS / f"{name}.json")["cells"].values():
            turns = found["plain"]["turns"]
            step, work = median(turns, "step_seconds_median"), median(turns, "kernel_seconds")
            if step and work and work > _BUSY * step:
                there = [each for each in (UNSLOTH, UNSLOTH_NO_CHECKPOINTING) if each in found]
                fastest = max(there, key=lambda each: median(found[each]["turns"], "tokens_per_second") or 0.0)
                plain.append(statistics.median(ratios(found, "graph", "plain")))
                unsloth.append(statistics.median(ratios(found, "graph", fastest)))
                first.append(found["graph"]["turns"][0]["first_step_seconds"])
                ahead.append(int(ahead_after(found, "graph", "plain").removesuffix(" steps")))
    return (
        f"Where the GPU is the limit, `engine=graph` was {_range(plain)} times as fast as plain Hugging Face and "
        f"{_range(unsloth)} times\nas fast as the faster Unsloth. Its first step, with compilation, took "
        f"{min(first):.0f} to {max(first):.0f} s, so it was ahead of plain\n"
        f"Hugging Face after {min(ahead)} to {max(ahead)} steps."
    )


def _range(values: list[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f}"


def _rounds(found: dict[str, Any]) -> int:
    return min(len(result["turns"]) for result in found.values())


def _speed_and_memory(result: dict[str, Any] | None) -> str:
    if result is None or not result["turns"]:
        return "-"
    speed = statistics.median(turn["tokens_per_second"] for turn in result["turns"])
    memory = statistics.median(turn["peak_allocated_gib"] for turn in result["turns"])
    return f"{speed:,.0f} at {memory:.1f} GiB"
