"""The files of results: read with today's names, joined, written, and put into the docs."""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.peers.plan import TUTORIAL, UNSLOTH, UNSLOTH_NO_CHECKPOINTING, Cell
from benchmarks.peers.table import table
from benchmarks.reports import write_report

_FORMAT = 2
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "h100"
PAGES = (ROOT / "docs" / "peers.md",)
NOT_MEASURED = "Not measured yet with the settings of this page."

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


def put_into(page: str, results: Path) -> str:
    """Return the page with the text between `<!-- NAME:begin -->` and `<!-- NAME:end -->` made from NAME.json."""

    def made(found: re.Match[str]) -> str:
        path = results / f"{found[1]}.json"
        text = _text(read(path)) if path.is_file() else NOT_MEASURED
        return f"<!-- {found[1]}:begin -->\n{text}\n<!-- {found[1]}:end -->"

    return re.sub(r"<!-- (peers_\w+):begin -->\n.*?<!-- \1:end -->", made, page, flags=re.DOTALL)
