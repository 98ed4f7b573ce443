"""Keep the records of sweeps in one file, and read them back.

A line is one record, a sweep before its trials. Figures are kept to their last digit, series to six digits. What names
places on the machine is left out. The same records always make the same bytes.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_lab.config import InvalidInput, TrackingConfig
from lora_lab.files import read_json
from lora_lab.reading import typed
from lora_lab.store.mlflow_store import open_tracker
from lora_lab.store.record import Point, Record
from lora_lab.store.sweep_folder import PLAN
from lora_lab.store.trial_folder import RECORD


def records_of(folder: Path) -> Iterator[Record]:
    """Yield a sweep's record, then those of its trials that are over.

    Raises: InvalidInput; ValueError when one of its files is damaged."""
    plan = read_json(folder / PLAN)
    if plan is None:
        raise InvalidInput(f"{folder} is not the folder of a sweep: it has no {PLAN} that can be read.")
    yield typed(Record, plan["record"])
    for path in sorted(folder.glob(f"[0-9]*/{RECORD}")):
        yield typed(Record, json.loads(path.read_text(encoding="utf-8")))


def encode(record: Record) -> str:
    """Return a record as a line."""
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
    """Return the record that `encode` made the line from."""
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
    """Write the file and return the number of records in it.

    Raises: InvalidInput, OSError, ValueError."""
    lines = [encode(record) for folder in folders for record in records_of(folder)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write("".join(f"{line}\n" for line in lines).encode())
    return len(lines)


def read(file: Path) -> list[Record]:
    """Return the records in a file.

    Raises: InvalidInput when it does not hold records; OSError."""
    try:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            return [decode(line) for line in lines]
    except (gzip.BadGzipFile, EOFError, zlib.error, ValueError, KeyError, AttributeError, TypeError) as fault:
        raise InvalidInput(f"{file} is not a whole file of packed records ({fault}).") from fault


def unpack(file: Path, root: Path) -> int:
    """Deliver the records into the store at `root`, which is made if there is none, and return their number.

    Raises: InvalidInput, TrackingFailed, OSError."""
    records = read(file)
    tracker = open_tracker(TrackingConfig(root=str(root)))
    for record in records:
        tracker.deliver(record, [])
    return len(records)
