"""Time fine-tuning stacks beside each other on one GPU, in turns within one session.

    python -m benchmarks.peers OUT [--cells 1x512,2x2048c] [--contenders plain,unsloth,graph] [--method qlora|lora]
    python -m benchmarks.peers table FILE.json        the table anew from what was stored

OUT/peers_METHOD.json has every turn, OUT/peers_METHOD.md the table. A cell that is done is written at once; cells of
several calls come together in one file. All contenders have the same random weights, adapters, rows and Trainer
settings.
"""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers.controller import Race, Settings, make_material
from benchmarks.peers.plan import CELLS, NEEDS, Cell
from benchmarks.peers.table import table
from benchmarks.reports import provenance, write_report
from lora_lab.store.environment import device_facts, environment
from lora_lab.trial.devices import choose_placement, worker_environment


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["table"]:
        path = Path(arguments[1])
        stored = json.loads(path.read_text(encoding="utf-8"))
        print(write(path.parent, stored["origin"], {k: v for k, v in stored.items() if k != "origin"}))
        return
    asked = _parse(arguments)
    placement = choose_placement(asked.device)
    shown = worker_environment(placement)
    origin = provenance(environment() | device_facts(placement), _command(arguments, asked))
    settings = Settings(
        contenders=asked.contenders,
        method=asked.method,
        model=asked.model,
        rounds=asked.rounds,
        steps=asked.steps,
        warmup=asked.warmup,
        window_seconds=asked.window_seconds,
        load_timeout=asked.load_timeout,
        turn_timeout=asked.turn_timeout,
    )
    content = _earlier(asked.out, settings)
    cells = [cell for cell in asked.cells if not (asked.resume and str(cell) in content["cells"])]
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        scratch = Path(folder)
        material = (asked.material or scratch).resolve() / f"material_{asked.model}"
        if cells:
            _say("making weights, adapters and tokenizer")
            make_material(material, asked.model, scratch, shown)
        for cell in cells:
            content["cells"][str(cell)] = Race(cell, settings, material, scratch, shown, _say).run()
            content["origins"][str(cell)] = origin
            write(asked.out, origin, content)
    print(table(content["cells"]))


def _say(line: str) -> None:
    print(line, flush=True)


def _command(arguments: list[str], asked: argparse.Namespace) -> str:
    """The command line as typed, but for folders of that machine."""
    folders = {str(asked.out): "OUT", str(asked.material): "MATERIAL"}
    return "python -m benchmarks.peers " + shlex.join(folders.get(word, word) for word in arguments)


def _earlier(out: Path, settings: Settings) -> dict[str, Any]:
    """What the file has of the same model, or nothing.

    Raises: SystemExit when it is of another model.
    """
    path = out / f"peers_{settings.method}.json"
    if not path.is_file():
        return {"method": settings.method, "model": settings.model, "origins": {}, "cells": {}}
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if stored["model"] != settings.model:
        raise SystemExit(f"{path} is of model {stored['model']}, not {settings.model}: choose another folder")
    del stored["origin"]
    return stored


def write(out: Path, origin: dict[str, str], content: dict[str, Any]) -> str:
    """Both files; returns the markdown's text."""
    text = table(content["cells"])
    versions = {
        f"{package} {version}"
        for results in content["cells"].values()
        for result in results.values()
        for package, version in result.get("versions", {}).items()
    }
    text += f"\n\nVersions in the contenders' processes: {', '.join(sorted(versions))}."
    devices = {each["device"] for each in content["origins"].values()}
    if len(devices) > 1:
        text = f"The cells were measured on different devices: {', '.join(sorted(devices))}.\n\n{text}"
    title = f"Fine-tuning stacks in turns: {content['method']}, {content['model']}"
    write_report(out, f"peers_{content['method']}", title, origin, text, content)
    return text


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--cells", type=_cells, default=_cells(",".join(CELLS)))
    parser.add_argument("--contenders", type=_contenders, default=[name for name in NEEDS if name != "lab_liger"])
    parser.add_argument("--method", choices=("qlora", "lora"), default="qlora")
    parser.add_argument("--model", default="qwen2_5_1_5b", help="a file of conf/model with an architecture")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps in a window, at least")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--window-seconds", type=float, default=2.5, help="later windows are at least so long")
    parser.add_argument("--load-timeout", type=float, default=300, help="seconds")
    parser.add_argument("--turn-timeout", type=float, default=180, help="seconds; the first turn has twice that")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--material", type=Path, help="folder that keeps the shared weights from call to call")
    parser.add_argument("--resume", action="store_true", help="leave out cells that the file has")
    asked = parser.parse_args(arguments)
    if min(asked.rounds, asked.steps, asked.warmup) < 1:
        parser.error("rounds, steps and warmup are 1 at least")
    return asked


def _cells(text: str) -> list[Cell]:
    try:
        return [Cell.parse(part) for part in text.split(",")]
    except ValueError as error:  # argparse would leave its words out
        raise argparse.ArgumentTypeError(str(error)) from None


def _contenders(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in NEEDS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no contender {', '.join(unknown)}; there are {', '.join(NEEDS)}")
    return names


if __name__ == "__main__":
    main(sys.argv[1:])
