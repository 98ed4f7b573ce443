"""Attempts at one job, in its folder: set aside by whoever resumes it, joined in its figures, on whatever clock."""

import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import some_by_day
from synthetic import Constant, SyntheticCard
from synthetic_job import SyntheticJob

from lora_lab.config import InvalidInput, TrackingConfig, TrialConfig
from lora_lab.events import Event
from lora_lab.files import write_json
from lora_lab.options import TrackingKind
from lora_lab.outcome import End, Outcome
from lora_lab.recompute import main
from lora_lab.store import heartbeat
from lora_lab.store.attempts import joined, moved_from
from lora_lab.store.claim import claim
from lora_lab.store.finishing import finish, finish_for_dead
from lora_lab.store.outbox import Outbox
from lora_lab.store.process_id import this_process
from lora_lab.store.record import Point, Record, thinned
from lora_lab.store.recovery import recover
from lora_lab.store.trial_folder import Inputs, Manifest, TrialFolder
from lora_lab.telemetry.host_facts import HostFacts, MemoryEstimate
from lora_lab.trial import session
from lora_lab.trial.session import Request, _claimed

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # a killed trial closes nothing

CARD = SyntheticCard(power=Constant(300.0), phase=0.3, read_jitter=0.3)
FINISHED = End(outcome=Outcome.finished, reason="")
UNIX = 1.7e9
NO_STORE = TrackingConfig(kind=TrackingKind.none)
FACTS = HostFacts(warnings=["warm"], metrics={"time/waiting_seconds": 3.0})


def first_attempt() -> list[Event]:
    job = SyntheticJob().start(steps=30)
    return job.stretch(0, 10).checkpoint(10).stretch(10, 20).evaluate(20, 1.0).stretch(20, 24, closed=False).events


def second_attempt(t: float) -> list[Event]:
    return SyntheticJob(t=t).start(steps=30, resumed=10).stretch(10, 20).evaluate(20, 2.0).stretch(20, 30).end().events


def asked_at(unix: float, t: float = 8.0, record: Record | None = None) -> Manifest:
    """Asked for at a Unix time, by a clock that shows `t` then."""
    return Manifest(
        owner=this_process(),
        t=t,
        tracking=TrackingConfig(),
        record=record or Record(name="r", params={}, started_ms=round(unix * 1e3)),
        unix_minus_monotonic=unix - t,
    )


def killed(folder: Path) -> TrialFolder:
    there = TrialFolder(folder)
    there.begin(asked_at(UNIX), TrialConfig(), {}, FACTS)
    for event in first_attempt():
        there.note_event(event)
    for sample in CARD.samples(50.0):
        there.note_sample(sample)
    return there


def resumed(folder: Path, t: float) -> tuple[TrialFolder, Record]:
    """The job after another boot, an hour later by every other clock."""
    before = TrialFolder(folder).manifest()
    assert before is not None
    there = TrialFolder(folder)
    assert there.set_aside(before) == 2
    asked = asked_at(UNIX + 3600.0, t, before.record)
    there.begin(asked, TrialConfig(), {}, HostFacts())
    for event in second_attempt(t + 2.0):
        there.note_event(event)
    for sample in replace(CARD, already=1.0).samples(45.0):  # the counter began again with the driver
        there.note_sample(replace(sample, t=sample.t + t))
    events, samples, damaged = there.read_lines()
    assert damaged == []
    return there, finish(there, asked, FINISHED, events, samples, HostFacts())[0]


@pytest.mark.parametrize("t", some_by_day([8.0, 5000.0, 3.0], by_day=[3.0]))
def test_attempts_on_other_clocks_make_one_job(tmp_path: Path, t: float) -> None:
    killed(tmp_path)
    there, record = resumed(tmp_path, t)
    assert record.started_ms == round(UNIX * 1e3)
    metrics = record.metrics
    assert (metrics["job/attempts"], metrics["job/steps"], metrics["window/steps"]) == (2.0, 30.0, 30.0)
    assert metrics["throughput/tokens_per_second"] == pytest.approx(1000.0)
    assert metrics["energy/joules"] == pytest.approx(300.0 * 30, abs=metrics["energy/joules_error"])
    first, second = 10.0 + 3.0 + 10.0 + 7.0 + 4.0, 10.0 + 7.0 + 10.0 + 2.0
    assert metrics["job/hours"] * 3600 == pytest.approx(first + second)
    assert metrics["job/kwh"] * 3.6e6 == pytest.approx(300.0 * (first + second), abs=metrics["job/kwh_error"] * 3.6e6)
    assert metrics["job/kwh_error"] * 3.6e6 < 2 * 300.0 * 1.5
    outline = there.outline()
    assert outline is not None
    assert outline["seconds"] < 600.0 < ((record.ended_ms or 0) - record.started_ms) / 1e3
    assert metrics["time/waiting_seconds"] == 3.0
    assert metrics["time/asked_to_first_step_seconds"] == pytest.approx(7.0)
    losses = [point for point in record.series if point.key == "step/loss"]
    assert [point.step for point in losses] == [*range(1, 31)]
    assert all(before.t_ms < after.t_ms for before, after in pairwise(losses))
    assert losses[10].t_ms - losses[9].t_ms > 3500e3, "the times are those of the attempt that counts"
    assert "warm" in record.tags["warnings"]
    assert main([str(tmp_path)]) == 0
    assert (there.path / "attempts" / "1" / "events.jsonl").is_file()


def test_a_kill_while_an_attempt_is_set_aside_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after each file that is moved or removed; then a start records the trial, or resumes it."""
    whole = tmp_path / "whole"
    killed(whole)
    asked = TrialFolder(whole).manifest()
    assert asked is not None
    finish_for_dead(TrialFolder(whole), asked)
    TrialFolder(whole).mark_delivered("run")
    whole_record = TrialFolder(whole).record()
    assert whole_record is not None
    moved: set[str] = set()
    left = 0

    def dies(name: str) -> Callable[..., object]:
        real = getattr(Path, name)

        def act(path: Path, *arguments: object, **keywords: object) -> object:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            moved.add(path.name)
            return real(path, *arguments, **keywords)

        return act

    for acts in range(8):
        folder = Path(shutil.copytree(whole, tmp_path / f"{acts}"))
        asked, left = TrialFolder(folder).manifest(), acts
        assert asked is not None
        with monkeypatch.context() as context:
            for name in ("rename", "unlink"):
                context.setattr(Path, name, dies(name))
            with pytest.raises(KeyboardInterrupt):
                TrialFolder(folder).set_aside(asked)
        there = TrialFolder(folder)
        if there.record() is None:
            recorded = finish_for_dead(there, asked)
            assert recorded.metrics["job/steps"] == whole_record.metrics["job/steps"], acts
        _, record = resumed(folder, 8.0)
        assert (record.metrics["job/attempts"], record.metrics["job/steps"]) == (2.0, 30.0), acts
    assert {"events.jsonl", "samples.jsonl", "seen.json", "record.json"} <= moved


def cut_off_job(tmp_path: Path) -> tuple[TrialFolder, Manifest]:
    """A job in multirun/ whose process is gone, with its record, which no store has."""
    there = killed(tmp_path / "multirun" / "day" / "job")
    asked = there.manifest()
    assert asked is not None
    asked = replace(asked, owner=replace(this_process(), boot_id="earlier"))
    write_json(there.path / "trial.json", asdict(asked))
    finish_for_dead(there, asked)
    asked = there.manifest()
    assert asked is not None
    return there, asked


def test_a_job_that_goes_on_waits_until_another_start_has_delivered_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    there, asked = cut_off_job(tmp_path)
    done: list[str] = []

    def sets_aside() -> None:
        with _claimed(Request(config=TrialConfig(), choices={}, command="", folder=there.path, resumed=asked)):
            there.set_aside(asked)
            done.append("set aside")

    other = threading.Thread(target=sets_aside)

    def slow_store(_: Outbox, folder: TrialFolder, record: Record) -> str:
        other.start()
        other.join(0.3)
        assert (folder.path / "summary.json").is_file()
        done.append("delivered")
        folder.mark_delivered("run")
        return "run"

    monkeypatch.setattr(Outbox, "deliver_trial", slow_store)
    found = recover(Outbox(NO_STORE))
    other.join()
    assert (done, found.delivered, found.lines()[1:]) == (["delivered", "set aside"], 1, [])
    assert not there.delivered, "the record of what goes on is still to be delivered"


def test_a_start_leaves_a_job_alone_that_is_set_aside_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would record the job as killed, and note that record as delivered, while the job goes on."""
    monkeypatch.chdir(tmp_path)
    there, asked = cut_off_job(tmp_path)
    monkeypatch.setattr(Outbox, "deliver_trial", lambda *_: pytest.fail("it was delivered"))
    with claim(there.path):
        there.set_aside(asked)
        assert recover(Outbox(NO_STORE)).lines() == []
    assert there.record() is None

    def resumed_meanwhile(*_: object) -> bool:
        there.begin(replace(asked, owner=this_process()), TrialConfig(), {}, HostFacts())
        return True

    monkeypatch.setattr(heartbeat, "gone", resumed_meanwhile)  # after the manifest was read
    assert recover(Outbox(NO_STORE)).lines() == []
    assert there.record() is None


def test_a_job_that_goes_on_does_not_wait_long_for_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, asked = cut_off_job(tmp_path)
    monkeypatch.setattr(session, "_MOST_SECONDS_TO_CLAIM", 0.1)
    request = Request(config=TrialConfig(), choices={}, command="", folder=there.path, resumed=asked)
    with claim(there.path), pytest.raises(InvalidInput, match="delivering the record"), _claimed(request):
        pytest.fail("it went on")
    with _claimed(request):
        pass
    write_json(there.path / "trial.json", asdict(replace(asked, owner=this_process())))
    with pytest.raises(InvalidInput, match="goes on with the job"), _claimed(request):
        pytest.fail("it went on")


def test_a_damaged_earlier_attempt_is_left_out_and_named(tmp_path: Path) -> None:
    killed(tmp_path)
    before = TrialFolder(tmp_path).manifest()
    assert before is not None
    TrialFolder(tmp_path).set_aside(before)
    (tmp_path / "attempts" / "1" / "trial.json").write_text("{")
    found, faults = TrialFolder(tmp_path).earlier()
    assert found == []
    assert "attempts/1/trial.json" in str(faults[0])


def test_a_long_series_is_thinned_evenly_with_both_its_ends() -> None:
    long = [Point(key="a", value=float(n), step=n, t_ms=n) for n in range(20_000)]
    short = [Point(key="b", value=0.0, step=n, t_ms=n) for n in range(2000)]
    found = thinned([*long, *short])
    steps = [point.step for point in found if point.key == "a"]
    assert (len(steps), steps[0], steps[-1]) == (2000, 0, 19_999)
    assert {after - before for before, after in pairwise(steps)} <= {10, 11}
    assert [point for point in found if point.key == "b"] == short


def test_the_estimate_is_the_one_that_was_made_first() -> None:
    def attempt(seen: HostFacts) -> Inputs:
        return Inputs(asked=asked_at(UNIX), events=[], samples=[], seen=seen)

    first, second = (
        MemoryEstimate(
            allocated=size, reserved=size, card=size, low=size, enough=size, high=size, slots=1, verdict="fits"
        )
        for size in (1, 2)
    )
    earlier = [attempt(HostFacts(no_estimate="not here yet")), attempt(HostFacts(estimate=first))]
    assert joined(earlier, attempt(HostFacts(estimate=second))).seen.estimate == first
    assert joined(earlier[:1], attempt(HostFacts(no_estimate="not here"))).seen.estimate is None


def test_what_differs_between_the_places_of_two_attempts_is_named() -> None:
    before = {"device": "H100", "device.uuid": "GPU-1", "version.torch": "2.9", "process.pid": "7", "folder": "here"}
    assert moved_from(before, before | {"process.pid": "8", "folder": "there"}) == ""
    now = {"device": "cpu", "version.torch": "2.10"}
    assert moved_from(before, now) == "device H100 -> cpu, device.uuid GPU-1 -> none, version.torch 2.9 -> 2.10"
