"""Runs read from one file of packed records (records_file.py), and the file that comes with lora_lab."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from lora_lab.quality.answer_rows import AnswerRow
from lora_lab.store.errors import TrackingFailed
from lora_lab.store.record import Record
from lora_lab.store.records_file import read
from lora_lab.store.runs import Readings, Run

SHIPPED = Path(__file__).parents[1] / "shipped" / "h100.jsonl.gz"
"""Records of benchmarks/sweep/cards.yaml: what configurations take on a whole H100."""


class PackedRuns:
    """The trials and sweeps of a file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.place = str(file)

    def runs(self) -> Iterable[Run]:
        """Return every trial and sweep.

        Raises: InvalidInput when the file does not hold records; OSError."""
        return [
            Run(
                run_id=record.id,
                above=record.parent,
                name=record.name,
                started_ms=record.started_ms,
                params=record.params,
                metrics=record.metrics,
                tags=record.tags | {"record_id": record.id},
            )
            for record in self._records.values()
        ]

    def series(self, run_id: str, keys: Sequence[str]) -> dict[str, Readings]:
        """Return these series of a run. Those that it does not have are left out."""
        found: dict[str, Readings] = {}
        for point in self._records[run_id].series:
            if point.key in keys:
                found.setdefault(point.key, []).append((point.t_ms, point.step, point.value))
        return found

    def answers(self, run_id: str) -> list[AnswerRow]:
        """Return no answers: a file of records has none."""
        return []

    def store_of(self, run_id: str) -> str:
        """Raise TrackingFailed, because a file is no store that a page could be kept in."""
        raise TrackingFailed(f"run {run_id} was read from {self.place}, which no store holds")

    @cached_property
    def _records(self) -> dict[str, Record]:
        return {record.id: record for record in read(self._file)}
