"""What every tracker promises: a record that is delivered once, twice or in parts is there once and whole."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import pytest
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from lora_lab.config import TrackingConfig
from lora_lab.options import TrackingKind
from lora_lab.quality.answer_rows import AnswerRow
from lora_lab.store.description import NOTE
from lora_lab.store.errors import SweepUnknown, TrackingFailed
from lora_lab.store.mlflow_names import SERIES, read_back
from lora_lab.store.mlflow_runs import MlflowRuns
from lora_lab.store.mlflow_store import MlflowTracker, open_tracker
from lora_lab.store.record import RUNNING, Point, Record
from lora_lab.store.saved_view import KEY, TAG
from lora_lab.store.tracker import InMemoryTracker, Tracker

MS = 1_700_000_000_000


@dataclass(frozen=True)
class Kept:
    """What a store has of one record."""

    name: str
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, float]
    series: dict[str, list[tuple[int, float, int]]]
    outcome: str
    running: bool
    parent: str | None
    """The store's id of the run above."""
    ended_ms: int | None


class Shelf(Protocol):
    """A store, and a look into it that does not go through its tracker."""

    def tracker(self) -> Tracker:
        """Opened anew, as by another start."""

    def kept(self) -> dict[str, Kept]:
        """What is there, by the store's ids."""


class Memory:
    def __init__(self) -> None:
        self._tracker = InMemoryTracker()

    def tracker(self) -> Tracker:
        return self._tracker

    def kept(self) -> dict[str, Kept]:
        return {run_id: self._kept(record) for run_id, record in self._tracker.records.items()}

    def _kept(self, record: Record) -> Kept:
        series: dict[str, list[tuple[int, float, int]]] = {}
        for p in record.series:
            series.setdefault(p.key, []).append((p.step, p.value, p.t_ms))
        return Kept(
            record.name,
            record.params,
            record.tags,
            record.metrics,
            series,
            record.outcome,
            record.outcome == RUNNING,
            record.parent,
            record.ended_ms,
        )


class Mlflow:
    def __init__(self, root: Path, experiment: str) -> None:
        self._config = TrackingConfig(kind=TrackingKind.local, root=str(root), experiment=experiment)
        self.client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")

    def tracker(self) -> Tracker:
        return open_tracker(self._config)

    def runs(self) -> list[Run]:
        experiment = self.client.get_experiment_by_name(self._config.experiment)
        return [] if experiment is None else list(self.client.search_runs([experiment.experiment_id]))

    def kept(self) -> dict[str, Kept]:
        return {run.info.run_id: self._kept(run) for run in self.runs()}

    def _kept(self, run: Run) -> Kept:
        history = {key: self.client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
        params, tags, history = read_back(run.data.params, run.data.tags, history)
        points = {key: [(p.step, p.value, p.timestamp) for p in found] for key, found in history.items()}
        series = {key: sorted(found) for key, found in points.items() if key.startswith("step/")}
        single = {key: found for key, found in points.items() if not key.startswith("step/")}
        assert {key: len(found) for key, found in single.items()} == dict.fromkeys(single, 1), "a figure has one value"
        tags = {k: v for k, v in tags.items() if not k.startswith("mlflow.") and k != "record_id"}
        return Kept(
            run.info.run_name,
            params,
            tags,
            {key: found[0][1] for key, found in single.items()},
            series,
            run.data.tags["outcome"],
            run.info.status == "RUNNING",
            run.data.tags.get("mlflow.parentRunId"),
            run.info.end_time,
        )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all tests: making its tables takes seconds. Each test has an experiment of its own."""
    folder = tmp_path_factory.mktemp("store") / "mlruns"
    open_tracker(TrackingConfig(root=str(folder)))
    return folder


@pytest.fixture
def mlflow(root: Path, request: pytest.FixtureRequest) -> Mlflow:
    return Mlflow(root, request.node.name)


@pytest.fixture(params=["memory", "mlflow"])
def shelf(request: pytest.FixtureRequest) -> Shelf:
    return Memory() if request.param == "memory" else request.getfixturevalue("mlflow")


def record(outcome: str = "finished", steps: int = 4, **changes: Any) -> Record:
    series = [Point(key="step/loss", value=3.0 - n / 8, step=n, t_ms=MS + n) for n in range(1, steps + 1)]
    series += [Point(key="step/seconds", value=0.5, step=n, t_ms=MS + n) for n in range(2, steps + 1)]
    asked: dict[str, Any] = {
        "name": "tiny qlora",
        "params": {"optimizer": "adamw", "optimizer.args": "{}", "model.path": "None", "data.path": ""},
        "chosen": ["optimizer"],
        "outcome": outcome,
        "started_ms": MS,
        "ended_ms": None if outcome == RUNNING else MS + 60_000,
        "tags": {"outcome": outcome, "device": "cpu", "absent.energy/joules_per_token": "no card"},
        "metrics": {} if outcome == RUNNING else {"loss/eval": 1.5, "throughput/tokens_per_second": 1e4, "zero": 0.0},
        "series": [] if outcome == RUNNING else series,
    }
    return Record(**{**asked, **changes})


def assert_kept(kept: Kept, wanted: Record) -> None:
    assert (kept.name, kept.params, kept.tags) == (wanted.name, wanted.params, wanted.tags)
    assert kept.metrics == wanted.metrics
    series: dict[str, list[tuple[int, float, int]]] = {}
    for p in wanted.series:
        series.setdefault(p.key, []).append((p.step, p.value, p.t_ms))
    assert kept.series == series
    assert (kept.outcome, kept.running) == (wanted.outcome, wanted.outcome == RUNNING)


def test_a_record_is_kept_whole(shelf: Shelf) -> None:
    wanted = record()
    run_id = shelf.tracker().deliver(wanted, [])
    [(there, kept)] = shelf.kept().items()
    assert there == run_id
    assert_kept(kept, wanted)
    assert kept.ended_ms == wanted.ended_ms


@pytest.mark.parametrize("steps", [0, 4, 2500])
def test_delivering_twice_is_the_same_as_once(shelf: Shelf, steps: int) -> None:
    wanted = record(steps=steps)
    tracker = shelf.tracker()
    ids = {tracker.deliver(wanted, []), tracker.deliver(wanted, []), shelf.tracker().deliver(wanted, [])}
    assert set(shelf.kept()) == ids
    [kept] = shelf.kept().values()
    assert_kept(kept, wanted)


def test_records_that_look_the_same_are_not_taken_for_one(shelf: Shelf) -> None:
    tracker = shelf.tracker()
    ids = [tracker.deliver(record(), []) for _ in range(3)]
    assert set(shelf.kept()) == set(ids)
    assert len(set(ids)) == 3


@pytest.mark.parametrize("outcome", ["finished", "killed", "diverged", "out_of_memory"])
def test_what_was_running_is_over_when_its_record_says_so(shelf: Shelf, outcome: str) -> None:
    wanted = record()
    begun = record(RUNNING, id=wanted.id)
    run_id = shelf.tracker().deliver(begun, [])
    assert_kept(shelf.kept()[run_id], begun)
    over = record(outcome, id=wanted.id)
    assert shelf.tracker().deliver(over, []) == run_id
    [kept] = shelf.kept().values()
    assert_kept(kept, over)


def test_a_sweep_that_is_taken_up_again_runs_again(shelf: Shelf) -> None:
    tracker = shelf.tracker()
    wanted = record("killed", series=[], is_sweep=True)
    run_id = tracker.deliver(wanted, [])
    again = replace(wanted, outcome=RUNNING, tags={**wanted.tags, "outcome": RUNNING})
    assert tracker.deliver(again, []) == run_id
    assert shelf.kept()[run_id].running
    over = replace(wanted, outcome="finished", ended_ms=MS + 90_000, tags={**wanted.tags, "outcome": "finished"})
    tracker.deliver(replace(over, metrics={}), [])
    [kept] = shelf.kept().values()
    assert (kept.running, kept.outcome, kept.ended_ms) == (False, "finished", MS + 90_000)


def test_a_trial_lies_under_its_sweep_when_that_was_delivered_before(shelf: Shelf) -> None:
    above = record(RUNNING, is_sweep=True)
    tracker = shelf.tracker()
    run_id = tracker.deliver(above, [])
    trials = [shelf.tracker().deliver(record(parent=above.id), []) for _ in range(2)]
    kept = shelf.kept()
    assert {kept[trial].parent for trial in trials} == {run_id}
    assert kept[run_id].parent is None
    assert len(kept) == 3


def test_a_trial_that_is_over_in_the_store_stays_as_it_is(shelf: Shelf) -> None:
    """What a later start makes of a folder on a full disk may be less than what was told at once."""
    wanted = record()
    run_id = shelf.tracker().deliver(wanted, [])
    assert shelf.tracker().deliver(record("killed", id=wanted.id, metrics={}, series=[]), []) == run_id
    [kept] = shelf.kept().values()
    assert_kept(kept, wanted)


def test_tags_are_added_to_a_trial_that_is_over_and_nothing_else_changes(shelf: Shelf) -> None:
    run_id = shelf.tracker().deliver(record(), [])
    before = shelf.kept()[run_id]
    for _ in range(2):
        shelf.tracker().add_tags(run_id, {"halving.stopped": "its held-out loss 3.2 was behind"})
    after = shelf.kept()[run_id]
    assert after.tags == before.tags | {"halving.stopped": "its held-out loss 3.2 was behind"}
    assert replace(after, tags=before.tags) == before


def test_a_trial_whose_sweep_the_store_does_not_know_asks_for_that_first(mlflow: Mlflow) -> None:
    with pytest.raises(SweepUnknown):
        mlflow.tracker().deliver(record(parent="unknown"), [])
    assert mlflow.kept() == {}


def test_where_to_look_is_said_in_words(shelf: Shelf) -> None:
    tracker = shelf.tracker()
    lines = tracker.where(tracker.deliver(record(), []))
    assert lines
    assert all(lines)


def test_nothing_is_left_to_end_where_nothing_runs(shelf: Shelf) -> None:
    tracker = shelf.tracker()
    assert tracker.end_orphans(lambda _: True) == 0
    tracker.deliver(record(), [])
    assert tracker.end_orphans(lambda _: True) == 0
    [kept] = shelf.kept().values()
    assert kept.outcome == "finished"


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_does_not_double_the_others(mlflow: Mlflow, loss: float) -> None:
    wanted = record()
    wanted.series.append(Point(key="step/loss", value=loss, step=5, t_ms=MS + 5))
    wanted.metrics["loss/train"] = loss
    for _ in range(3):
        run_id = mlflow.tracker().deliver(wanted, [])
    history = mlflow.client.get_metric_history(run_id, SERIES["step/loss"])
    assert sorted(point.step for point in history) == [1, 2, 3, 4, 5]
    [last] = [point.value for point in history if point.step == 5]
    assert math.isnan(last) if math.isnan(loss) else math.copysign(1.7e308, loss) / last < 1
    assert len(mlflow.client.get_metric_history(run_id, "loss/train")) == 1


CALLS = ["create_run", "log_batch", "log_artifact", "log_artifacts", "set_terminated"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_a_delivery_that_was_cut_off_is_gone_on_with(
    mlflow: Mlflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, done: bool
) -> None:
    """At any of its calls, whether or not the store had carried it out: a server's answer can be lost."""
    wanted, files = record(), [*some_files(tmp_path)]
    monkeypatch.setattr(MlflowClient, call, cut_off(getattr(MlflowClient, call), done))
    with pytest.raises(TrackingFailed, match="connection lost"):
        mlflow.tracker().deliver(wanted, files)
    monkeypatch.undo()
    run_id = mlflow.tracker().deliver(wanted, files)
    [(there, kept)] = mlflow.kept().items()
    assert there == run_id
    assert_kept(kept, wanted)
    assert_has_files(mlflow, run_id, tmp_path)


@pytest.mark.parametrize("call", ["log_artifact", "set_terminated"])
def test_a_delivery_that_was_cut_off_is_gone_on_with_though_another_start_took_it_for_an_orphan(
    mlflow: Mlflow, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str
) -> None:
    """From another folder, with the same store: it sees a run without a process, and not the record on disk."""
    wanted, files = record(), some_files(tmp_path)
    monkeypatch.setattr(MlflowClient, call, cut_off(getattr(MlflowClient, call), False))
    with pytest.raises(TrackingFailed):
        mlflow.tracker().deliver(wanted, files)
    monkeypatch.undo()
    assert mlflow.tracker().end_orphans(lambda _: True) == 1
    run_id = mlflow.tracker().deliver(wanted, files)
    assert_kept(mlflow.kept()[run_id], wanted)
    assert_has_files(mlflow, run_id, tmp_path)


def test_a_delivery_that_was_cut_off_at_once_says_whose_it_was(mlflow: Mlflow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder can be gone when the next start comes: then the run is all there is to tell from."""
    wanted = record()
    wanted.tags["process.pid"] = "17"
    monkeypatch.setattr(MlflowClient, "log_batch", cut_off(MlflowClient.log_batch, False))
    with pytest.raises(TrackingFailed):
        mlflow.tracker().deliver(wanted, [])
    monkeypatch.undo()
    assert mlflow.tracker().end_orphans(lambda tags: tags.get("process.pid") == "17") == 1


def cut_off(real: Callable[..., Any], done: bool) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> None:
        if done:
            real(*args, **kwargs)
        raise MlflowException("connection lost")

    return call


def some_files(folder: Path) -> list[Path]:
    (folder / "adapter" / "deep").mkdir(parents=True, exist_ok=True)
    for name in ("summary.json", "adapter/a.json", "adapter/deep/b.bin"):
        (folder / name).write_bytes(os.urandom(100))
    return [folder / "summary.json", folder / "adapter"]


def assert_has_files(mlflow: Mlflow, run_id: str, folder: Path) -> None:
    root = Path(mlflow.client.download_artifacts(run_id, ""))
    there = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert there == {"summary.json", "adapter/a.json", "adapter/deep/b.bin"}
    for name in there:
        assert (root / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("is_sweep", [False, True])
def test_files_and_folders_are_kept_with_the_run(mlflow: Mlflow, tmp_path: Path, is_sweep: bool) -> None:
    wanted = record(is_sweep=is_sweep)
    run_id = mlflow.tracker().deliver(wanted, some_files(tmp_path))
    assert_has_files(mlflow, run_id, tmp_path)
    if is_sweep:  # its table and plan change while it is taken up again
        mlflow.tracker().deliver(wanted, some_files(tmp_path))
        assert_has_files(mlflow, run_id, tmp_path)


def test_answers_are_a_table_in_mlflow_and_are_read_back(mlflow: Mlflow, root: Path, tmp_path: Path) -> None:
    row = AnswerRow(
        prompt="p", gold="ä", base="b", tuned="t", base_ended=True, tuned_ended=False, base_tokens=1, tuned_tokens=2
    )
    file = tmp_path / "answers.jsonl"
    file.write_text(f"{row.encode()}\n" * 3, encoding="utf-8")
    mlflow.tracker().deliver(record(id="same", outcome=RUNNING), [file])  # and again, as after a kill
    run_id = mlflow.tracker().deliver(record(id="same"), [file])
    table = json.loads((root / "artifacts" / run_id / "artifacts" / "answers.json").read_text(encoding="utf-8"))
    assert table["columns"][:4] == ["prompt", "gold", "base", "tuned"]
    assert [each[1] for each in table["data"]] == ["ä"] * 3
    tag = mlflow.client.get_run(run_id).data.tags["mlflow.loggedArtifacts"]
    assert json.loads(tag) == [{"path": "answers.json", "type": "table"}], "as MLflow's own log_table says it"
    read = MlflowRuns(f"sqlite:///{root}/mlflow.db", None).answers
    assert read(run_id) == [row] * 3
    assert read(mlflow.tracker().deliver(record(), [])) == []


@pytest.mark.parametrize(
    ("outcome", "status"),
    [("finished", "FINISHED"), ("killed", "KILLED"), (RUNNING, "RUNNING")]
    + [
        (outcome, "FAILED")
        for outcome in ("out_of_memory", "predicted_out_of_memory", "diverged", "unsupported", "timed_out", "failed")
    ],
)
def test_mlflows_status_is_its_nearest_word_for_the_outcome(mlflow: Mlflow, outcome: str, status: str) -> None:
    mlflow.tracker().deliver(record(outcome), [])
    [run] = mlflow.runs()
    assert (run.info.status, run.data.tags["outcome"]) == (status, outcome)
    assert run.info.start_time == MS


def test_only_what_still_runs_though_its_process_is_gone_is_ended(mlflow: Mlflow) -> None:
    tracker = mlflow.tracker()
    owners = {"gone": RUNNING, "gone too": RUNNING, "there": RUNNING, "over": "finished"}
    ids = {
        who: tracker.deliver(record(outcome, tags={"outcome": outcome, "process.pid": who}), [])
        for who, outcome in owners.items()
    }
    asked = []

    def gone(tags: dict[str, str]) -> bool:
        asked.append(tags["process.pid"])
        return tags["process.pid"].startswith("gone")

    assert tracker.end_orphans(gone) == 2
    assert sorted(asked) == ["gone", "gone too", "there"]
    kept = mlflow.kept()
    assert {who: kept[ids[who]].outcome for who in ids} == {
        "gone": "killed",
        "gone too": "killed",
        "there": RUNNING,
        "over": "finished",
    }
    assert {run.info.run_id: run.info.status for run in mlflow.runs()}[ids["gone"]] == "KILLED"
    assert tracker.end_orphans(gone) == 0, "once is enough"


def test_runs_of_other_programs_and_experiments_are_not_asked_for(mlflow: Mlflow, root: Path) -> None:
    other = Mlflow(root, "another experiment")
    other.tracker().deliver(record(RUNNING), [])
    assert mlflow.tracker().end_orphans(lambda _: True) == 0
    [run] = other.runs()
    assert run.info.status == "RUNNING"


@pytest.mark.parametrize(
    "text",
    ["two\nlines", "\u00e9\u2028\U0001f600", "'; drop table runs; --", "x" * 20_000, "\udcff of a file name", "a\x00b"],
    ids=["lines", "unicode", "quotes", "long", "surrogate", "nul"],
)
def test_any_text_of_other_programs_can_be_recorded(mlflow: Mlflow, text: str) -> None:
    """A reason, a path or a setting can hold anything; the record is worth more than its every character."""
    wanted = record("failed")
    wanted.tags["reason"] = text
    wanted.params["model.path"] = text
    mlflow.tracker().deliver(wanted, [])
    [kept] = mlflow.kept().values()
    for there in (kept.tags["reason"], kept.params["model.path"]):
        assert there[:1] == text[:1] or text[0] == "\udcff"
        assert len(there) >= min(len(text), 5000)
    assert kept.metrics == wanted.metrics


def test_a_store_that_was_deleted_under_the_tracker_is_told(tmp_path: Path) -> None:
    shelf = Mlflow(tmp_path / "mlruns", "e")
    tracker = shelf.tracker()
    tracker.deliver(record(), [])
    (tmp_path / "mlruns" / "mlflow.db").unlink()
    with pytest.raises(TrackingFailed, match="deleted or replaced"):
        tracker.deliver(record(), [])


def test_the_local_store_is_the_default_and_none_is_memory(tmp_path: Path) -> None:
    assert isinstance(open_tracker(TrackingConfig(kind=TrackingKind.none)), InMemoryTracker)
    assert isinstance(open_tracker(TrackingConfig(root=str(tmp_path))), MlflowTracker)


def test_the_saved_view_is_made_once_and_never_overwritten(mlflow: Mlflow) -> None:
    tracker = mlflow.tracker()
    run_id = tracker.deliver(record(), [])
    lines = "\n".join(tracker.where(run_id))
    assert f"viewStateShareKey={KEY}" in lines
    assert f"/runs/{run_id}?" in lines
    [run] = mlflow.runs()
    mlflow.client.set_experiment_tag(run.info.experiment_id, TAG, "mine")
    tracker.where(run_id)
    assert mlflow.client.get_experiment(run.info.experiment_id).tags[TAG] == "mine"


def test_a_sweeps_description_that_somebody_wrote_stays(mlflow: Mlflow) -> None:
    above = record(RUNNING, is_sweep=True)
    run_id = mlflow.tracker().deliver(above, [])
    assert NOTE in mlflow.runs()[0].data.tags
    mlflow.client.set_tag(run_id, NOTE, "mine")
    mlflow.tracker().deliver(replace(above, outcome="finished"), [])
    assert mlflow.runs()[0].data.tags[NOTE] == "mine"
