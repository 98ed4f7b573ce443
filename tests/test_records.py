"""Records packed into one file make the same store again, and nothing in the file names a place."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lora_lab.records import main
from lora_lab.store.local_store import address_of
from lora_lab.store.packed_runs import PackedRuns
from lora_lab.store.record import RUNNING, Point, Record
from lora_lab.store.records_file import read
from lora_lab.store.stored_runs import StoredRuns, open_store

FACTORIAL = Path(__file__).parents[1] / "benchmarks/results/h100/factorial.jsonl.gz"
MS = 1_700_000_000_000


def a_record(start: int, **changes: Any) -> Record:
    told: dict[str, Any] = {"name": f"tiny {start}", "params": {"optimizer": "adamw"}, "outcome": "finished"}
    return Record(**{**told, "started_ms": MS + start, "ended_ms": MS + start + 500, **changes})


def test_packed_records_make_the_same_trials_again_and_name_no_place(tmp_path: Path) -> None:
    folder = tmp_path / "multirun" / "grid"
    tags = {"outcome": "finished", "folder": str(folder), "process.host": "somewhere", "process.pid": "17"}
    above = a_record(0, tags=tags, is_sweep=True)
    points = [Point(key="step/loss", value=2 / (n + 3), step=n, t_ms=MS + 250 * n) for n in range(40)]
    gpu = a_record(1, parent=above.id, tags={**tags, "device.uuid": "GPU-1"}, series=points)
    cpu = a_record(2, parent=above.id, tags=tags, outcome="killed", metrics={"a": 1 / 3, "b": math.inf})
    for name, content in (
        ("sweep", {"record": asdict(above)}),
        ("0000/record", asdict(gpu)),
        ("0001/record", asdict(cpu)),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(content))
    outs = [tmp_path / name for name in ("one.gz", "other.gz")]
    for out in outs:
        assert main(["pack", str(folder), str(out)]) == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert str(tmp_path) not in "".join(map(repr, read(outs[0])))
    root = tmp_path / "mlruns"
    assert main(["unpack", str(outs[0]), str(root)]) == 0
    store = open_store(address_of(root / "mlflow.db"))
    trials, [sweep] = store.runs()
    assert [(t.name, t.sweep, t.metrics) for t in trials] == [(r.name, sweep.run_id, r.metrics) for r in (gpu, cpu)]
    assert [t.place.unit for t in trials] == ["GPU-1", "somewhere"]
    assert "process.pid" not in trials[1].tags
    packed = StoredRuns(PackedRuns(outs[0]))
    same = packed.runs()[0]
    assert [(t.name, t.metrics, t.outcome, t.place) for t in same] == [
        (t.name, t.metrics, t.outcome, t.place) for t in trials
    ]
    assert {t.sweep for t in same} == {above.id}
    series = store.series(trials[0].run_id)["step/loss"]
    assert packed.series(same[0].run_id)["step/loss"] == series
    assert [(t, step) for t, step, _ in series] == [(p.t_ms, p.step) for p in points]
    assert [value for _, _, value in series] == pytest.approx([p.value for p in points], rel=1e-5)


def test_the_factorial_that_is_shipped_is_whole() -> None:
    seen: set[str | None] = {None}
    for record in read(FACTORIAL):
        assert record.parent in seen, "a sweep comes before its trials, and no trial is without its sweep"
        assert record.is_sweep == (record.parent is None)
        assert record.outcome != RUNNING
        assert not {"folder", "process.host"} & record.tags.keys()
        seen.add(record.id)
    assert len(seen) == 1 + 5 + 121


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", str(tmp_path), str(tmp_path / "out.gz")]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "out.gz").exists()


@pytest.mark.parametrize("content", [b"not packed", FACTORIAL.read_bytes()[:5000]])
def test_a_file_that_is_not_whole_makes_no_store(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, root = tmp_path / "records.jsonl.gz", tmp_path / "mlruns"
    file.write_bytes(content)
    assert main(["unpack", str(file), str(root)]) == 2
    assert str(file) in capsys.readouterr().err
    assert not root.exists()
