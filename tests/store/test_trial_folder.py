"""What a trial leaves on disk, however its process and its disk end."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.config import TrackingConfig, TrialConfig
from lora_lab.events import DataCounted, Ended, Event, PhaseBegan, Step, Warned, encode
from lora_lab.files import read_json, write_json
from lora_lab.options import TrackingKind
from lora_lab.outcome import End, Outcome
from lora_lab.phase import Phase
from lora_lab.store import trial_folder
from lora_lab.store.finishing import finish, finish_for_dead
from lora_lab.store.outbox import Outbox
from lora_lab.store.process_id import Owner, this_process
from lora_lab.store.record import Record
from lora_lab.store.recovery import recover
from lora_lab.store.trial_folder import Manifest, TrialFolder
from lora_lab.telemetry.figures import Summary
from lora_lab.telemetry.host_facts import HostFacts
from lora_lab.telemetry.sampler import Sample

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # a killed trial closes nothing

FINISHED = End(outcome=Outcome.finished, reason="")
STEPS = 5


def step(number: int) -> Step:
    return Step(
        t=10.0 + number, step=number, seconds=1.0, loss=2.0, rows=2, slots=64, real=50, trained=20, skipped=False
    )


EVENTS: list[Event] = [
    PhaseBegan(t=9.0, phase=Phase.data.value),
    DataCounted(
        t=9.5,
        rows_read=9,
        rows_train=8,
        rows_heldout=1,
        rows_truncated=0,
        rows_without_labels=0,
        real=99,
        trained=44,
        digest="d",
    ),
    PhaseBegan(t=10.0, phase=Phase.window.value),
    *(step(number) for number in range(1, STEPS + 1)),
]


def sample(number: int) -> Sample:
    return Sample(t=10.0 + number, energy_joules=1e5 + number, average_watts=99.5, used_bytes=2**30)


SAMPLES = [sample(number) for number in range(7)]


def asked_for(tracking: TrackingConfig | None = None, owner: Owner | None = None) -> Manifest:
    return Manifest(
        owner=owner or this_process(),
        t=8.0,
        tracking=tracking or TrackingConfig(),
        record=Record(name="r", params={"seed": "0"}, tags={"device": "cpu", "point": "p"}),
        unix_minus_monotonic=1e9,
    )


def begun(folder: Path, asked: Manifest | None = None) -> TrialFolder:
    """A trial that has just been asked for."""
    there = TrialFolder(folder)
    there.begin(asked or asked_for(), TrialConfig(), {"machine.os": "Linux"}, HostFacts())
    return there


def told(folder: TrialFolder, events: list[Event], samples: list[Sample]) -> None:
    for event in events:
        folder.note_event(event)
    for reading in samples:
        folder.note_sample(reading)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing fails where a file would grow beyond `size` bytes, in the middle of a write as on a disk that is
    full: with 0 nothing at all can be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_was_asked_for_is_there_before_anything_is_said(tmp_path: Path) -> None:
    asked = asked_for(TrackingConfig(kind=TrackingKind.server, uri="http://host", experiment="e"))
    begun(tmp_path / "deep" / "trial", asked)
    other = TrialFolder(tmp_path / "deep" / "trial")
    assert other.manifest() == asked
    assert (other.record(), other.outline(), other.delivered) == (None, None, False)
    assert read_json(other.path / "environment.json") == {"machine.os": "Linux"}
    assert yaml.safe_load((other.path / "config.yaml").read_text())["batch_size"] == TrialConfig().batch_size


def test_a_folder_in_which_no_trial_began_has_nothing(tmp_path: Path) -> None:
    there = TrialFolder(tmp_path)
    assert (there.manifest(), there.record(), there.outline(), there.delivered) == (None, None, None, False)


def test_a_refused_trial_leaves_nothing_to_record(tmp_path: Path) -> None:
    there = begun(tmp_path)
    there.give_up()
    assert TrialFolder(tmp_path).manifest() is None


@pytest.mark.parametrize("refused", [False, True])
def test_a_trial_that_is_over_holds_no_file_open(tmp_path: Path, refused: bool) -> None:
    asked = asked_for()
    there = begun(tmp_path, asked)
    if refused:
        there.give_up()
    else:
        finish(there, asked, FINISHED, EVENTS, SAMPLES, HostFacts())
    assert [file.path for file in psutil.Process().open_files() if file.path.startswith(str(tmp_path))] == []


@given(stopped=st.integers(0, len(EVENTS)), readings=st.integers(0, len(SAMPLES)), torn=st.integers(0, 60))
def test_a_killed_trial_is_recorded_with_all_that_was_said_before(
    tmp_path_factory: pytest.TempPathFactory, stopped: int, readings: int, torn: int
) -> None:
    """Nothing is closed, flushed or finished here: a SIGKILL at any instant leaves no more than this."""
    path = tmp_path_factory.mktemp("killed")
    killed = begun(path)  # a name keeps it, and with it its files, open to the end
    told(killed, EVENTS[:stopped], SAMPLES[:readings])
    with (path / "events.jsonl").open("a") as journal:
        journal.write(encode(step(99))[:torn])  # the kernel took half of a line

    after = TrialFolder(path)
    asked = after.manifest()
    assert asked is not None
    record = finish_for_dead(after, asked)
    assert (record.outcome, record.tags["outcome"]) == ("killed", "killed")
    assert "gone" in record.tags["reason"]
    assert record.id == asked.record.id, "delivered before or not, it is the same run"
    losses = [p.step for p in record.series if p.key == "step/loss"]
    assert losses == [event.step for event in EVENTS[:stopped] if isinstance(event, Step)]
    assert len([p for p in record.series if p.key == "card/power_watts"]) == readings
    assert ("data_digest" in record.tags) == (stopped > 1)
    said = [event for event in EVENTS[:stopped] if isinstance(event, PhaseBegan)]
    assert record.tags["phase"] == (said[-1].phase if said else "start")
    again = TrialFolder(path)
    assert repr(again.record()) == repr(record)
    outline = again.outline()
    assert outline is not None
    assert (outline["outcome"], outline["point"]) == ("killed", "p")


@pytest.mark.parametrize(
    ("ended", "step_tag"),
    [
        (Ended(t=20.0, outcome="finished", reason=""), None),
        (Ended(t=20.0, outcome="diverged", reason="the loss rose", step=3), "3"),
        (Ended(t=20.0, outcome="failed", reason="KeyError: x", traceback="Traceback: x"), "6"),
        (Ended(t=20.0, outcome="out_of_memory", reason="full", asked_bytes=2**31, peak_host_bytes=2**30), "6"),
    ],
)
def test_a_trial_that_had_said_its_last_word_ends_as_it_said(
    tmp_path: Path, ended: Ended, step_tag: str | None
) -> None:
    """The parent was killed after the worker's end and before it had written the record."""
    killed = begun(tmp_path)
    told(killed, [*EVENTS, ended], SAMPLES)
    after = TrialFolder(tmp_path)
    asked = after.manifest()
    assert asked is not None
    record = finish_for_dead(after, asked)
    assert (record.outcome, record.tags.get("reason", "")) == (ended.outcome, ended.reason)
    assert record.tags.get("step") == step_tag
    assert record.ended_ms == 1_000_000_020_000
    assert (tmp_path / "traceback.txt").is_file() == (ended.traceback is not None)
    if ended.asked_bytes:
        assert record.metrics["out_of_memory/asked_gib"] == 2.0


def test_a_trial_that_was_killed_before_it_said_anything_took_no_days(tmp_path: Path) -> None:
    """The next start may be days later: that is not how long the trial ran."""
    asked = asked_for()
    day = 86_400_000
    asked.record.started_ms -= 3 * day
    begun(tmp_path, asked)
    there = TrialFolder(tmp_path)
    found = there.manifest()
    assert found is not None
    record = finish_for_dead(there, found)
    assert record.ended_ms is not None
    assert record.ended_ms - record.started_ms < day


def test_a_finished_trials_record_is_the_same_in_memory_and_on_disk(tmp_path: Path) -> None:
    asked = asked_for()
    there = begun(tmp_path, asked)
    told(there, EVENTS, SAMPLES)
    seen = HostFacts(warnings=["the card was shared"], metrics={"time/waiting_seconds": 3.0})
    assert there.record() is None
    record, summary = finish(there, asked, FINISHED, EVENTS, SAMPLES, seen)
    assert repr(TrialFolder(tmp_path).record()) == repr(record)
    assert "the card was shared" in summary.warnings
    assert "the card was shared" in record.tags["warnings"]
    assert record.metrics["time/waiting_seconds"] == 3.0
    outline = there.outline()
    assert outline is not None
    assert outline["outcome"] == "finished"
    assert outline["metrics"].items() <= record.metrics.items()
    assert outline["metrics"]["time/waiting_seconds"] == 3.0
    assert outline["seconds"] == ((record.ended_ms or 0) - record.started_ms) / 1e3


def test_a_summary_without_a_record_is_no_end(tmp_path: Path) -> None:
    """Killed between the two files: the record is what counts, and comes last."""
    asked = asked_for()
    there = begun(tmp_path, asked)
    finish(there, asked, FINISHED, EVENTS, SAMPLES, HostFacts())
    (tmp_path / "record.json").unlink()
    assert (there.outline(), there.record()) == (None, None)


@pytest.mark.parametrize(
    "text", ["plain", "two\nlines", "\u00e9\u2028", "\udcff of a file name", '"quoted" \\ and \x00'], ids=ascii
)
def test_any_text_of_other_programs_can_be_recorded(tmp_path: Path, text: str) -> None:
    """Paths and messages can hold bytes that are no UTF-8."""
    asked = asked_for()
    asked.record.tags["folder"] = text
    there = begun(tmp_path, asked)
    end = End(outcome=Outcome.failed, reason=text, traceback=f"Traceback\n{text}")
    events: list[Event] = [*EVENTS, Warned(t=15.0, text=text)]
    told(there, events, [])
    record, _ = finish(there, asked, end, events, [], HostFacts(no_sensor="no card", warnings=[text]))
    kept = TrialFolder(tmp_path).record()
    assert repr(kept) == repr(record)
    assert kept is not None
    assert (kept.tags["reason"], kept.tags["folder"]) == (text, text)
    assert (tmp_path / "traceback.txt").is_file()


def in_folder(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class _Unwritable:
    def __str__(self) -> str:
        raise RuntimeError("no words for it")


def in_a_circle() -> list[Any]:
    circle: list[Any] = []
    circle.append(circle)
    return circle


@pytest.mark.parametrize(
    ("content", "error"),
    [({(1, 2): 3}, TypeError), (in_a_circle(), ValueError), ({"a": _Unwritable()}, RuntimeError)],
)
@pytest.mark.parametrize("before", [None, {"old": 1}])
def test_what_cannot_be_written_leaves_what_was_there(
    tmp_path: Path, content: object, error: type[Exception], before: object
) -> None:
    path = tmp_path / "a.json"
    if before is not None:
        write_json(path, before)
    with pytest.raises(error):
        write_json(path, content)
    assert read_json(path) == before
    assert in_folder(tmp_path) == (set() if before is None else {"a.json"}), "no part of it is left behind"


@pytest.mark.parametrize("size", [0, 1, 4000])
def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": list(range(100))})
    with files_of_at_most(size), pytest.raises(OSError, match="File too large"):
        write_json(path, {"new": list(range(10000))})
    assert read_json(path) == {"old": list(range(100))}
    assert in_folder(tmp_path) == {"a.json"}


@given(
    content=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=12,
    )
)
def test_what_was_written_is_read_as_it_was(tmp_path_factory: pytest.TempPathFactory, content: object) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    write_json(path, content)
    assert read_json(path) == content


@pytest.mark.parametrize("content", [None, b"", b"{", b'{"a": "\xff"}', b"\x00" * 9])
def test_a_missing_or_damaged_file_is_read_as_none(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    assert read_json(tmp_path / "a.json") is None
    assert read_json(tmp_path) is None


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


@given(size=st.integers(0, 2000))
def test_a_journal_that_found_the_disk_full_is_written_whole_at_the_end(
    tmp_path_factory: pytest.TempPathFactory, size: int
) -> None:
    path = tmp_path_factory.mktemp("full")
    asked = asked_for()
    there = begun(path, asked)
    with files_of_at_most(size):
        told(there, EVENTS, SAMPLES)
    told(there, [step(STEPS + 1)], [sample(8)])  # there is room again, but the line before is torn
    finish(there, asked, FINISHED, EVENTS, SAMPLES, HostFacts())
    assert lines_of(path / "events.jsonl") == [encode(event) for event in [*EVENTS, step(STEPS + 1)]]
    assert lines_of(path / "samples.jsonl") == [s.encode() for s in [*SAMPLES, sample(8)]]


def test_a_journal_goes_on_as_soon_as_there_is_room_and_knows_all_its_lines_meanwhile(tmp_path: Path) -> None:
    there = begun(tmp_path)
    with files_of_at_most(700):
        told(there, EVENTS, SAMPLES)
        events, samples, damaged = there.read_lines()
        assert (events, samples, damaged) == (EVENTS, SAMPLES, [])
    assert (tmp_path / "events.jsonl").stat().st_size == 700
    there.note_event(step(99))
    assert TrialFolder(tmp_path).read_lines()[0] == [*EVENTS, step(99)]
    (tmp_path / "events.jsonl").unlink()
    assert there.read_lines()[0] == [*EVENTS, step(99)], "of a folder that was removed, too"


def test_a_disk_that_stays_full_costs_no_figure_and_is_warned_of(tmp_path: Path) -> None:
    asked = asked_for()
    there = begun(tmp_path, asked)
    with files_of_at_most(100):
        told(there, EVENTS, SAMPLES)
        record, summary = finish(there, asked, FINISHED, EVENTS, SAMPLES, HostFacts())
        there.mark_delivered("r1")
    assert record.outcome == "finished"
    assert len([point for point in record.series if point.key == "step/loss"]) == STEPS
    assert [warning for warning in summary.warnings if str(tmp_path) in warning and "File too large" in warning]
    assert not [name for name in in_folder(tmp_path) if name.startswith(".")], "nothing half written is left"


def test_a_trial_cannot_begin_on_a_full_disk(tmp_path: Path) -> None:
    with files_of_at_most(0), pytest.raises(OSError, match="File too large"):
        begun(tmp_path)
    assert TrialFolder(tmp_path).manifest() is None


def test_a_trial_that_was_over_on_a_full_disk_is_not_killed_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store had room and took the record; the trial's own disk had none, so its folder says too little."""
    monkeypatch.chdir(tmp_path)
    asked = asked_for(TrackingConfig(root=str(tmp_path / "mlruns")), owner=replace(this_process(), boot_id="earlier"))
    there = begun(tmp_path / "multirun" / "day" / "time", asked)
    with files_of_at_most(1500):
        told(there, EVENTS, SAMPLES)
        said = [*EVENTS, Ended(t=20.0, outcome="finished", reason="")]
        record, _ = finish(there, asked, FINISHED, said, [], HostFacts())
    store = Outbox(asked.tracking)
    with monkeypatch.context() as full:
        full.setattr(trial_folder, "write_json", _refuse)
        run_id = store.deliver_trial(there, record)
    assert run_id is not None
    recover(store)
    from mlflow.tracking import MlflowClient

    run = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlruns/mlflow.db").get_run(run_id)
    assert (run.info.status, run.data.tags["outcome"]) == ("FINISHED", "finished")


def _refuse(path: Path, content: object) -> None:
    raise OSError(28, "No space left on device")


def test_delivered_is_remembered(tmp_path: Path) -> None:
    there = begun(tmp_path)
    there.mark_delivered("r1")
    assert TrialFolder(tmp_path).delivered
    assert read_json(tmp_path / "delivered.json") == {"run_id": "r1"}


def test_the_store_gets_every_file_but_those_it_has_as_the_run_itself(tmp_path: Path) -> None:
    asked = asked_for()
    there = begun(tmp_path, asked)
    (tmp_path / "adapter").mkdir()
    (tmp_path / ".record.json1234").touch()  # left by a kill in the middle of a write
    finish(there, asked, End(outcome=Outcome.failed, reason="x", traceback="t"), EVENTS, SAMPLES, HostFacts())
    there.mark_delivered("r1")
    assert {path.name for path in there.artifacts()} == {
        "adapter",
        "config.yaml",
        "environment.json",
        "events.jsonl",
        "samples.jsonl",
        "seen.json",
        "summary.json",
        "traceback.txt",
        "trial.json",
    }


def test_tags_are_added_to_a_record_that_is_over_and_wait_on_disk_for_the_store(tmp_path: Path) -> None:
    record = Record(name="trial", params={}, outcome="finished", tags={"outcome": "finished"})
    folder, box = TrialFolder(tmp_path), Outbox(TrackingConfig(kind=TrackingKind.none))
    box.add_tags(folder, {"why": "none is there yet"})
    assert folder.record() is None
    asked = Manifest(owner=this_process(), t=0.0, tracking=TrackingConfig(), record=record)
    folder.begin(asked, TrialConfig(), {}, HostFacts())
    folder.write_end(record, Summary(), End(outcome=Outcome.finished, reason=""), HostFacts())
    assert folder.add_tags({"halving.stopped": "no"}) is None, "no store has it"
    folder.mark_delivered("run1")
    assert folder.add_tags({"halving.stopped": "it was behind"}) == "run1"
    kept = folder.record()
    assert kept is not None
    assert kept.tags == {"outcome": "finished", "halving.stopped": "it was behind"}
    (tmp_path / "record.json").write_text("{")
    box.add_tags(folder, {"halving.stopped": "lost"})
    assert "record.json" in box.fault
