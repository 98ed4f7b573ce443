"""A job's run in the store while the job runs: what is there, what the end makes of it, and what a bad store costs."""

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import SmallDisk, give_store, store_of, until
from mlflow.tracking import MlflowClient
from synthetic import job_of

from lora_lab.config import TrackingConfig, TrialConfig
from lora_lab.events import Event, Step
from lora_lab.outcome import End, Outcome
from lora_lab.store import live_run, local_store, outbox
from lora_lab.store.finishing import finish
from lora_lab.store.live_run import LiveRun
from lora_lab.store.live_series import MOST_AT_ONCE, MOST_STEPS, LiveSeries
from lora_lab.store.outbox import Outbox, owner_tags
from lora_lab.store.process_id import this_process
from lora_lab.store.record import Record
from lora_lab.store.recovery import recover
from lora_lab.store.tracker import ATTEMPT
from lora_lab.store.trial_folder import Manifest, TrialFolder
from lora_lab.telemetry.host_facts import HostFacts
from lora_lab.telemetry.sampler import Sample

FINISHED = End(outcome=Outcome.finished, reason="")
DEAD = 2**22 + 1
"""A pid that no process can have."""


class Lab:
    """One job, from what was asked to its record in the store."""

    def __init__(self, folder: Path, store: Path, steps: int = 30, pid: int | None = None) -> None:
        self.home = folder
        self.tracking = TrackingConfig(root=str(give_store(folder, store).parent))
        self.folder = TrialFolder(folder / "multirun" / "today" / "now")
        owner = this_process() if pid is None else replace(this_process(), pid=pid)
        record = Record(name="a job", params={"learning_rate": "1e-4"}, tags=owner_tags(owner, self.folder.path))
        self.begun = time.monotonic() - 10 - steps / 10
        self.asked = Manifest(owner=owner, t=self.begun, tracking=self.tracking, record=record)
        self.folder.begin(self.asked, TrialConfig(), {}, HostFacts())
        self.events = list(job_of(steps, self.begun))
        self.samples = [Sample(t=self.begun + n / 20, instant_watts=100.0 + n) for n in range(2 * steps)]
        self.outbox = Outbox(self.tracking)
        self.said: list[str] = []

    def close(self) -> None:
        """Close the files of a job that is not over."""
        self.folder.give_up()

    def live(self, every_seconds: float = 0.05) -> LiveRun:
        live = self.outbox.follow(self.asked, self.samples, self.said.append)
        live._every = every_seconds
        return live

    def see(self, live: LiveRun, events: Sequence[Event]) -> None:
        for event in events:
            self.folder.note_event(event)
            live.see(event)

    def finish(self, events: Sequence[Event] | None = None, end: End = FINISHED) -> str | None:
        """Record the job's end as the session does."""
        told = self.events if events is None else list(events)
        record, _ = finish(self.folder, self.asked, end, told, self.samples, HostFacts())
        return self.outbox.deliver_trial(self.folder, record)

    def histories(self) -> dict[str, list[tuple[int, int, float]]]:
        """Every point that the store has of the only run, by its name."""
        client, [run] = store_of(self.home)
        names = client.get_run(run.info.run_id).data.metrics
        points = {name: client.get_metric_history(run.info.run_id, name) for name in names}
        return {name: sorted((p.step, p.timestamp, p.value) for p in found) for name, found in points.items()}

    def status(self) -> str:
        return str(store_of(self.home)[1][0].info.status)


@pytest.fixture
def lab(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    monkeypatch.chdir(tmp_path)
    with contextlib.closing(Lab(tmp_path, empty_store)) as made:
        yield made


def shown(lab: Lab, steps: int) -> bool:
    """Whether the store has the loss of this step, or of one after it."""
    return bool(store_of(lab.home)[1]) and max(lab.histories().get("Steps/loss", [(0, 0, 0.0)]))[0] >= steps


def test_a_job_is_seen_while_it_runs_and_its_end_is_that_of_a_job_that_was_not(
    lab: Lab, tmp_path: Path, empty_store: Path
) -> None:
    live = lab.live()
    lab.see(live, lab.events[:20])
    until(lambda: shown(lab, 10), "the first steps")
    assert lab.status() == "RUNNING"
    assert store_of(lab.home)[1][0].data.tags["outcome"] == "running"
    assert any("mlflow ui" in line for line in lab.said)
    running = lab.histories()
    assert [step for step, _, _ in running["Steps/heldout_loss"]] == [10]
    assert running["Steps/power_watts"]
    lab.see(live, lab.events[20:])
    until(lambda: shown(lab, 30), "the last step")
    lab.finish()
    assert lab.status() == "FINISHED"
    ended = lab.histories()
    (tmp_path / "other").mkdir()
    other = Lab(tmp_path / "other", empty_store)
    other.asked, other.samples = lab.asked, lab.samples
    other.finish(lab.events)
    assert ended == other.histories()
    assert all(set(running[name]) <= set(ended[name]) for name in running)


def test_a_window_trial_sends_nothing(lab: Lab) -> None:
    live = lab.live()
    lab.see(live, [event for event in lab.events if isinstance(event, Step)])
    assert live.ended()
    assert store_of(lab.home)[1] == []


def test_a_locked_store_holds_nothing_up_and_has_everything_in_the_end(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_store, "LOCKED_SECONDS", 0.05)
    live = lab.live()
    with contextlib.closing(sqlite3.connect(f"{lab.tracking.root}/mlflow.db", isolation_level=None)) as other:
        other.execute("begin exclusive")
        began = time.monotonic()
        lab.see(live, lab.events)
        assert time.monotonic() - began < 1
        until(lambda: bool(lab.said), "the fault")
        other.execute("rollback")
    assert "database is locked" in lab.said[0]
    until(lambda: shown(lab, 30), "the job is shown after all")
    assert sum("database is locked" in line for line in lab.said) == 1
    assert lab.finish() is not None
    assert [step for step, _, _ in lab.histories()["Steps/loss"]] == list(range(1, 31))


@pytest.mark.mounts
def test_a_full_disk_below_the_store_holds_nothing_up_either(lab: Lab, tmp_path: Path, empty_store: Path) -> None:
    with SmallDisk(tmp_path / "disk", "16m") as disk:
        root = give_store(disk.path, empty_store).parent
        lab.tracking = lab.outbox.tracking = TrackingConfig(root=str(root))
        lab.home = disk.path
        live = lab.live()
        lab.see(live, lab.events[:20])
        until(lambda: shown(lab, 10), "the first steps")
        disk.fill()
        lab.see(live, lab.events[20:])
        until(lambda: any("is full" in line for line in lab.said), "the fault")
        disk.empty()
        until(lambda: shown(lab, 30), "the job is shown after all")
        assert lab.finish() is not None
        assert [step for step, _, _ in lab.histories()["Steps/loss"]] == list(range(1, 31))
        assert lab.status() == "FINISHED"


def test_a_request_that_hangs_leaves_the_record_to_the_next_start(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the record sent meanwhile, the hanging request could make its run a second time."""
    answer, asked = threading.Event(), threading.Event()
    real = MlflowClient.create_run

    def hang(*args: Any, **kwargs: Any) -> Any:
        asked.set()
        answer.wait(60)
        return real(*args, **kwargs)

    for module in (live_run, outbox):
        monkeypatch.setattr(module, "ENDING_SECONDS", 0.2)
    monkeypatch.setattr(MlflowClient, "create_run", hang)
    live = lab.live()
    lab.see(live, lab.events)
    assert asked.wait(60)
    assert lab.finish() is None
    assert "next start delivers" in lab.outbox.outlook("the record")
    answer.set()
    until(live.ended, "the request's end")
    monkeypatch.undo()
    record = lab.folder.record()
    assert record is not None
    assert Outbox(lab.tracking).deliver_trial(lab.folder, record) is not None
    assert len(store_of(lab.home)[1]) == 1
    assert lab.status() == "FINISHED"


def test_the_run_of_a_killed_parent_is_ended_by_the_next_start(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lab = Lab(tmp_path, empty_store, pid=DEAD)
    live = lab.live()
    lab.see(live, lab.events[:20])
    until(lambda: shown(lab, 10), "the first steps")
    assert live.ended()
    lab.folder._close()
    assert lab.status() == "RUNNING"
    assert recover(Outbox(lab.tracking)).killed == 1
    [run] = store_of(lab.home)[1]
    assert (run.info.status, run.data.tags["outcome"]) == ("KILLED", "killed")


def test_a_job_that_is_resumed_runs_again_in_the_same_run(lab: Lab) -> None:
    killed = End(outcome=Outcome.killed, reason="by a signal")
    first = lab.finish(lab.events[:15], killed)
    assert lab.status() == "KILLED"
    lab.outbox = Outbox(lab.tracking)
    lab.asked.record.tags = {**owner_tags(lab.asked.owner, lab.folder.path), ATTEMPT: "2"}
    lab.folder.begin(lab.asked, TrialConfig(), {}, HostFacts())
    live = lab.live()
    lab.see(live, lab.events)
    until(lambda: shown(lab, 30), "the steps after the resume")
    assert lab.status() == "RUNNING"
    assert lab.finish() == first
    [run] = store_of(lab.home)[1]
    assert (run.info.status, run.data.tags["outcome"]) == ("FINISHED", "finished")
    assert "reason" not in run.data.tags
    assert [step for step, _, _ in lab.histories()["Steps/loss"]] == list(range(1, 31))


@pytest.mark.parametrize("steps", [50, 5_000, 200_000])
def test_what_is_sent_of_a_job_is_bounded_in_all_and_at_once(steps: int) -> None:
    series = LiveSeries([], 0.0)
    sent, most = 0, 0
    for event in job_of(steps, every=steps // 10):
        series.see(event)
        if isinstance(event, Step) and event.step % (steps // 50) == 0:
            points = [point for point in series.points(event.t + 10) if point.key == "step/loss"]
            series.sent()
            sent, most = sent + len(points), max(most, len(points))
    assert most <= MOST_AT_ONCE
    assert min(steps, MOST_STEPS) / 2 <= sent <= MOST_STEPS + 1


def test_what_a_store_has_not_taken_is_offered_again_and_stays_small() -> None:
    series = LiveSeries([], 0.0)
    for event in job_of(3_000, every=1_000):
        series.see(event)
    first = series.points(1e6)
    steps = [point.step for point in first if point.key == "step/loss"]
    assert len(steps) == MOST_AT_ONCE
    assert (steps[0], steps[-1]) == (1, 3_000)
    assert [point.step for point in first if point.key == "heldout/loss"] == [1_000, 2_000, 3_000]
    assert series.points(1e6) == first
    series.sent()
    assert series.points(1e6) == []
