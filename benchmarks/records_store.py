"""Records of sweeps in one file, and a store made of them again.

    python -m benchmarks.records_store pack FOLDER... OUT.jsonl.gz    folders of sweeps (multirun/...)
    python -m benchmarks.records_store unpack FILE.jsonl.gz ROOT      a local store at ROOT/mlflow.db

A line is one record, a sweep before its trials. Figures are kept to their last digit, series to six digits. What
names places on the machine is left out. The same records always make the same bytes.
"""

import argparse
import gzip
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_lab.config import InvalidInput, TrackingConfig
from lora_lab.files import read_json
from lora_lab.outcome import EXIT_REFUSED
from lora_lab.reading import typed
from lora_lab.store.mlflow_store import TrackingFailed, open_tracker
from lora_lab.store.record import Point, Record
from lora_lab.store.sweep_folder import PLAN
from lora_lab.store.trial_folder import RECORD


def records_of(folder: Path) -> Iterator[Record]:
    """A sweep's record, then those of its trials that are over.

    Raises: InvalidInput."""
    plan = read_json(folder / PLAN)
    if plan is None:
        raise InvalidInput(f"{folder} holds no sweep: there is no {PLAN} that can be read.")
    yield typed(Record, plan["record"])
    for path in sorted(folder.glob(f"[0-9]*/{RECORD}")):
        yield typed(Record, json.loads(path.read_text(encoding="utf-8")))


def encode(record: Record) -> str:
    """A record as a line."""
    fields = asdict(record)
    tags = record.tags
    fields["tags"] = {key: text for key, text in tags.items() if key != "folder" and not key.startswith("process.")}
    if "device.uuid" not in tags and "process.host" in tags:
        fields["tags"]["process.host"] = tags["process.host"]  # nothing else tells one CPU's trials from another's
    series: dict[str, list[list[float]]] = {}
    for point in record.series:
        kept = [point.t_ms - record.started_ms, point.step, float(f"{point.value:.6g}")]
        series.setdefault(point.key, []).append(kept)
    fields["series"] = series
    return json.dumps(fields, separators=(",", ":"))


def decode(line: str) -> Record:
    """Back from what `encode` made of it."""
    fields: dict[str, Any] = json.loads(line)
    points = [
        Point(key=key, value=value, step=step, t_ms=fields["started_ms"] + since_ms)
        for key, series in fields.pop("series").items()
        for since_ms, step, value in series
    ]
    record = typed(Record, fields | {"series": []})
    record.series = points
    return record


def pack(folders: Iterable[Path], out: Path) -> int:
    """Write the file; how many records are in it.

    Raises: InvalidInput, OSError."""
    lines = [encode(record) for folder in folders for record in records_of(folder)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write("".join(f"{line}\n" for line in lines).encode())
    return len(lines)


def read(file: Path) -> list[Record]:
    """The records in a file.

    Raises: OSError, ValueError."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [decode(line) for line in lines]


def unpack(file: Path, root: Path) -> int:
    """Deliver the records into the store at `root`, which is made if there is none; how many there are.

    Raises: InvalidInput, TrackingFailed, OSError, ValueError."""
    tracker = open_tracker(TrackingConfig(root=str(root)))
    records = read(file)
    for record in records:
        tracker.deliver(record, [])
    return len(records)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.records_store", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="records of sweeps into one file")
    packing.add_argument("folders", metavar="FOLDER", nargs="+", type=Path)
    packing.add_argument("out", metavar="OUT.jsonl.gz", type=Path)
    unpacking = commands.add_parser("unpack", help="a local store from such a file")
    unpacking.add_argument("file", metavar="FILE.jsonl.gz", type=Path)
    unpacking.add_argument("root", metavar="ROOT", type=Path)
    asked = parser.parse_args(arguments)
    try:
        if asked.command == "pack":
            print(f"{pack(asked.folders, asked.out)} records in {asked.out}")
        else:
            print(f"{unpack(asked.file, asked.root)} records in {asked.root / 'mlflow.db'}")
    except (InvalidInput, TrackingFailed, OSError, ValueError) as fault:
        print(fault, file=sys.stderr)
        return EXIT_REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
