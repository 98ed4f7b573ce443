"""Nothing that one trial or sweep left behind, whatever has become of it, stops another, or goes unsaid."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

from lora_lab import recompute
from lora_lab.config import InvalidInput, TrackingConfig, TrialConfig
from lora_lab.events import Ended, Event, PhaseBegan, Step, decode, encode
from lora_lab.options import TrackingKind
from lora_lab.outcome import End, Outcome
from lora_lab.placement import Placement
from lora_lab.reading import Damaged
from lora_lab.store.finishing import finish
from lora_lab.store.outbox import Outbox
from lora_lab.store.process_id import this_process
from lora_lab.store.record import RUNNING, Point, Record
from lora_lab.store.recovery import Recovered, recover, remember_outside
from lora_lab.store.sweep_folder import Plan, Planned, SweepFolder, outlines
from lora_lab.store.trial_folder import Manifest, TrialFolder, _Outline
from lora_lab.sweep.plan import take_up
from lora_lab.telemetry.host_facts import HostFacts, Idle
from lora_lab.telemetry.nvml import Card
from lora_lab.telemetry.sampler import Sample
from lora_lab.trial.idle_power import keep_for_block, of_block

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # a killed trial closes nothing

NO_STORE = TrackingConfig(kind=TrackingKind.none)
GONE = replace(this_process(), boot_id="an earlier one")
EVENTS: list[Event] = [
    PhaseBegan(t=9.0, phase="window"),
    *(
        Step(t=10.0 + n, step=n, seconds=1.0, loss=2.0, rows=2, slots=64, real=50, trained=20, skipped=False)
        for n in (1, 2, 3)
    ),
]
SAMPLES = [Sample(t=10.0 + n, average_watts=99.5, used_bytes=2**30, processes=((1, None),)) for n in range(3)]
IDLE = Idle(watts=9.0, error_watts=1.0, source="counter", start=1.0, end=6.0, state="at rest", measured_ms=1)


def seen() -> HostFacts:
    return HostFacts(idle=replace(IDLE), warnings=["w"], metrics={"m": 1.0})


def killed(path: Path, name: str = "a trial") -> TrialFolder:
    """As a SIGKILL leaves it."""
    folder = TrialFolder(path)
    series = [Point(key="k", value=1.0, step=1, t_ms=1)]
    tags = {"device": "cpu", "point": "p"}
    record = Record(name=name, params={"seed": "0"}, tags=tags, metrics={"m": 1.0}, series=series)
    folder.begin(Manifest(owner=GONE, t=8.0, tracking=NO_STORE, record=record), TrialConfig(), {}, seen())
    folder.keep_idle(IDLE, SAMPLES, seen())
    for event in EVENTS:
        folder.note_event(event)
    for sample in SAMPLES:
        folder.note_sample(sample)
    return folder


def finished(path: Path) -> TrialFolder:
    """One that is over, and that no store has."""
    folder = killed(path)
    asked = folder.manifest()
    assert asked is not None
    finish(folder, asked, End(outcome=Outcome.finished, reason=""), EVENTS, SAMPLES, seen())
    return folder


TRIAL = Planned(number=0, settings={"k": "v"}, asked_place=0, repeat=0, overrides=["k=v"], point="p", fingerprint="f")


def sweep(path: Path) -> SweepFolder:
    folder = SweepFolder(path)
    record = Record(name="a sweep", params={"points": "1"}, is_sweep=True, tags={"k": "v"})
    conditions = {"p": {"code": "c"}}
    folder.write(
        Plan(owner=GONE, tracking=NO_STORE, record=record, conditions=conditions, trials=[TRIAL], launched=["0000"])
    )
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with one of each; every test has a copy of it."""
    place = tmp_path_factory.mktemp("made")
    day = place / "multirun" / "day"
    killed(day / "1")
    finished(day / "2")
    finished(sweep(day / "3").path / "0000")
    killed(day / "4", "the other")
    return place


@pytest.fixture
def day(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "place", symlinks=True))
    return Path("multirun") / "day"


def next_start(day: Path) -> Recovered:
    """All that a start does about earlier ones. The other trial is recorded whatever else there is."""
    found = recover(Outbox(NO_STORE))
    assert (day / "4" / "delivered.json").is_file()
    other = TrialFolder(day / "4").record()
    assert other is not None
    assert (other.outcome, other.tags["step"]) == ("killed", "4")
    return found


def names(found: Recovered, path: Path) -> bool:
    return any(str(path) in line for line in found.lines())


# --- what can become of a field, from the types that it was written from


KINDS: dict[Any, Any] = {int: 5, str: "x", bool: True, float: 0.5, NoneType: None, list: [[]], dict: {"x": {"y": []}}}
BEYOND = {"an infinite number": float("inf"), "not a number": float("nan"), "a number beyond sense": 10**400}


def takes(hint: Any) -> set[Any]:
    """Which of KINDS may stand where `hint` is the type."""
    if get_origin(hint) in (Union, UnionType):
        return set().union(*map(takes, get_args(hint)))
    plain = get_origin(hint) or (dict if is_dataclass(hint) else hint)
    return {float: {float, int}, tuple: {list}}.get(plain, {plain})


@dataclass(frozen=True)
class Harm:
    """What is done to one field."""

    path: tuple[str | int, ...]
    how: str
    value: Any = None
    removed: bool = False

    def to(self, content: Any) -> Any:
        content = json.loads(json.dumps(content))
        node = content
        for key in self.path[:-1]:
            node = node[key]
        if self.removed:
            del node[self.path[-1]]
        else:
            node[self.path[-1]] = self.value
        return content


def harms(hint: Any, content: Any, path: tuple[str | int, ...] = (), name: str = "") -> Iterator[Harm]:
    """Everything that makes of `content`, which was written from `hint`, something else."""
    inner = [kind for kind in get_args(hint) if kind is not NoneType]
    if get_origin(hint) in (Union, UnionType) and len(inner) == 1:
        return (yield from harms(inner[0], content, path, name) if content is not None else ())
    if is_dataclass(hint) and isinstance(content, dict):
        for field in fields(hint):
            kind, where = get_type_hints(hint)[field.name], (*path, field.name)
            if field.default is MISSING and field.default_factory is MISSING:
                yield Harm(where, "removed", removed=True)
            for other, value in KINDS.items():
                if other not in takes(kind):
                    yield Harm(where, f"is {other.__name__}", value)
            for how, number in BEYOND.items():
                finite = field.name not in ("loss", "value") or isinstance(number, int)
                if {int, float} & takes(kind) and finite:
                    yield Harm(where, how, number)
            if field.name in content:
                yield from harms(kind, content[field.name], where, field.name)
        yield Harm((*path, "colour"), "unknown to this version", "red")
    elif get_origin(hint) in (list, dict) and content:
        key: str | int = 0 if isinstance(content, list) else next(iter(content))
        for other, value in KINDS.items():
            if other not in takes(inner[-1]):
                yield Harm((*path, key), f"is {other.__name__}", value)
        yield from harms(inner[-1], content[key], (*path, key), name)  # type: ignore[index]


# --- what can become of a file


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def holding(content: bytes) -> Callable[[Path], None]:
    return lambda path: void(path.write_bytes(content))


def void(_: object) -> None:
    return None


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_link_to(target: str) -> Callable[[Path], None]:
    def link(path: Path) -> None:
        path.unlink()
        path.symlink_to(target if target != "itself" else path.name)

    return link


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


FILE_HARMS: dict[str, Callable[[Path], None]] = {
    "truncated": truncated,
    "empty": holding(b""),
    "bytes": holding(b"\xff\xfe\x00\xe9"),
    "zeros": holding(b"\0" * 4096),
    "null": holding(b"null\n"),
    "a list": holding(b"[]\n"),
    "a number": holding(b"5\n"),
    "a text": holding(b'"x"\n'),
    "a huge number": holding(b"1" * 5000 + b"\n"),
    "nested deeply": holding(b"[" * 100_000 + b"\n"),
    "a folder": a_folder,
    "a pipe": a_pipe,
    "a link to nothing": a_link_to("/nowhere/at/all"),
    "a link to itself": a_link_to("itself"),
}
TORN = ("truncated", "empty")
"""What a kill or a full disk leaves of lines too: no more is said of it."""

ON_DISK = {"1/trial.json": Manifest, "2/record.json": Record, "2/trial.json": Manifest, "3/sweep.json": Plan}
"""Without any of these, what is in the folder cannot be recorded."""


@pytest.mark.parametrize("harm", FILE_HARMS)
@pytest.mark.parametrize("file", ON_DISK)
def test_a_file_that_is_none_is_named_at_every_start(day: Path, file: str, harm: str) -> None:
    FILE_HARMS[harm](day / file)
    for _ in range(2):
        assert names(next_start(day), day / file)


@pytest.mark.parametrize("file", ON_DISK)
def test_a_field_that_is_none_is_named(day: Path, file: str) -> None:
    """All fields of a file in one folder tree: each in a copy of its trial."""
    content = json.loads((day / file).read_text())
    cases = list(harms(ON_DISK[file], content))
    assert len(cases) > 50
    for number, harm in enumerate(cases):
        copy = day.parent / "copies" / str(number)
        copy.mkdir(parents=True)
        for one in (day / file).parent.glob("*.json*"):
            shutil.copy(one, copy / one.name)
        (copy / Path(file).name).write_text(json.dumps(harm.to(content)))
    found = next_start(day)
    said = "\n".join(found.lines())
    untold = [h for n, h in enumerate(cases) if f"multirun/copies/{n}/{Path(file).name}: " not in said]
    assert untold == []
    assert len(found.damaged) == len(cases), "a line each"


@pytest.mark.parametrize("harm", FILE_HARMS)
@pytest.mark.parametrize("name", ["seen.json", "events.jsonl", "samples.jsonl"])
def test_what_a_killed_trial_had_said_before_the_damage_is_recorded_with_a_warning(
    day: Path, name: str, harm: str
) -> None:
    FILE_HARMS[harm](day / "1" / name)
    found = next_start(day)
    record = TrialFolder(day / "1").record()
    if (name, harm) == ("seen.json", "a folder"):  # what was seen could not be written again
        assert (record, names(found, day / "1" / name)) == (None, True)
        return
    assert record is not None
    assert record.outcome == "killed"
    torn = name != "seen.json" and harm in TORN  # lines that a kill tore
    assert (name in record.tags.get("warnings", "")) == (not torn)


LINES = [b"5", b'"x"', b"null", b"[]", b"{", b"", b'{"t": Infinity}', b'{"t": 1e999}', b'{"t": 1, "x": "\xe9"}', b"\0"]


@pytest.mark.parametrize("line", [*LINES, b"[" * 100_000, b"1" * 5000], ids=lambda line: repr(line[:20]))
@pytest.mark.parametrize("name", ["events.jsonl", "samples.jsonl"])
def test_lines_before_a_damaged_one_are_kept(day: Path, name: str, line: bytes) -> None:
    path = day / "1" / name
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + line + b"\n" + b"".join(rest))
    next_start(day)
    record = TrialFolder(day / "1").record()
    assert record is not None
    series = {"events.jsonl": "step/loss", "samples.jsonl": "card/used_gib"}
    kept = {which: sum(point.key == key for point in record.series) for which, key in series.items()}
    whole = {"events.jsonl": 3, "samples.jsonl": 3}
    assert kept == whole | {name: 0 if name == "events.jsonl" else 1}
    assert f"{name}: line 2" in record.tags["warnings"]


def example(hint: Any) -> Any:
    """The JSON of some value of a type."""
    inner = get_args(hint)
    if is_dataclass(hint):
        return {name: example(kind) for name, kind in get_type_hints(hint).items()}
    if get_origin(hint) in (Union, UnionType):
        return example(inner[0])
    if get_origin(hint) in (list, tuple):
        return [example(kind) for kind in inner if kind is not ...]
    return {"x": example(inner[1])} if get_origin(hint) is dict else KINDS[hint]


@pytest.mark.parametrize("kind", [*Event.__args__, Sample])
def test_no_line_with_a_field_that_is_none_is_read(kind: Any) -> None:
    read = Sample.decode if kind is Sample else decode
    name = {} if kind is Sample else {"event": kind.__name__}
    content = example(kind)
    read(json.dumps(name | content))
    for harm in harms(kind, content):
        with pytest.raises(Damaged, match=harm.path[0]):
            read(json.dumps(name | harm.to(content)))


@pytest.mark.parametrize(
    "event",
    [
        Ended(t=20.0, outcome="exploded", reason=""),
        Step(t=1e10, step=2**62, seconds=5e-324, loss=1.0, rows=0, slots=0, real=2**62, trained=-5, skipped=False),
    ],
)
def test_numbers_and_words_that_cannot_be_stop_nothing(day: Path, event: Event) -> None:
    with (day / "1" / "events.jsonl").open("a") as file:
        file.write(encode(event) + "\n")
    found = next_start(day)
    assert names(found, day / "1") or TrialFolder(day / "1").record() is not None


@pytest.mark.parametrize("harm", FILE_HARMS)
@pytest.mark.parametrize("name", ["2/delivered.json", "3/delivered.json"])
def test_a_damaged_note_of_a_delivery_delivers_again(day: Path, name: str, harm: str) -> None:
    next_start(day)
    (day / name).write_text("{}")
    FILE_HARMS[harm](day / name)
    assert names(next_start(day), day / name)
    if name == "2/delivered.json":
        assert names(next_start(day), day / name) == (harm == "a folder"), "what can be written again is whole now"


@pytest.mark.parametrize("name", ["2", "3/0000", "3", "0000"])
def test_something_else_in_the_place_of_a_folder_stops_nothing(day: Path, name: str) -> None:
    for harm in ("a number", "a link to nothing", "a link to itself", "a pipe"):
        shutil.rmtree(day / name, ignore_errors=True)
        (day / name).unlink(missing_ok=True)
        (day / name).touch()
        FILE_HARMS[harm](day / name)
        next_start(day)
        assert len(outlines(Path("multirun"))) >= 2


def test_a_list_of_folders_elsewhere_is_read_as_far_as_it_can_be(day: Path) -> None:
    elsewhere = killed(Path("elsewhere") / "\udcff strange")
    listed = Path("multirun") / "outside.txt"
    listed.write_bytes(b"/nowhere/\xe9\n\0\n" + b"x" * 9000 + b"\n")
    remember_outside(elsewhere.path)
    assert names(next_start(day), listed)
    assert elsewhere.delivered, "its name is strange, and yet a name"
    a_folder(listed)
    assert names(next_start(day), listed)


def test_a_lock_that_cannot_be_had_is_named(day: Path) -> None:
    (day.parent / ".recovery.lock").mkdir()
    assert names(recover(Outbox(NO_STORE)), day.parent / ".recovery.lock")


# --- sweeps


def test_resume_measures_again_what_cannot_be_read(day: Path) -> None:
    folder = SweepFolder(day / "3")
    summary = folder.path / "0000" / "summary.json"
    content = json.loads(summary.read_text())
    attempt = folder.attempt(TRIAL)
    assert attempt is not None
    assert attempt.done
    assert folder.damaged([TRIAL]) == []
    for harm in harms(_Outline, content):
        summary.write_text(json.dumps(harm.to(content)))
        assert folder.attempt(TRIAL) is None, harm
        [line] = folder.damaged([TRIAL])
        assert str(summary) in line
    for how in FILE_HARMS.values():
        summary.unlink() if summary.is_symlink() or not summary.is_dir() else summary.rmdir()
        summary.write_text(json.dumps(content))
        how(summary)
        assert folder.attempt(TRIAL) is None
        assert folder.damaged([TRIAL])
        assert folder.next_attempt(TRIAL) == "0000-2"
    assert len(outlines(Path("multirun"))) == 1, "the forecast goes by the others"


def test_a_record_that_no_store_has_and_that_cannot_be_read_is_no_end(day: Path) -> None:
    folder = SweepFolder(day / "3")
    truncated(folder.path / "0000" / "record.json")
    assert folder.attempt(TRIAL) is None
    assert "record.json" in folder.damaged([TRIAL])[0]


def test_a_file_in_the_place_of_a_trials_folder_keeps_its_name(day: Path) -> None:
    shutil.rmtree(day / "3" / "0000")
    (day / "3" / "0000").touch()
    assert SweepFolder(day / "3").attempt(TRIAL) is None
    assert SweepFolder(day / "3").next_attempt(TRIAL) == "0000-2"


@pytest.mark.parametrize("harm", FILE_HARMS)
def test_a_plan_that_cannot_be_read_is_not_gone_on_with(day: Path, harm: str) -> None:
    assert take_up([TRIAL], Path("new")) is not None
    FILE_HARMS[harm](day / "3" / "sweep.json")
    assert take_up([TRIAL], Path("new")) is None
    with pytest.raises(InvalidInput, match=r"3/sweep\.json"):
        take_up([TRIAL], day / "3")
    [line] = [line for line in next_start(day).lines() if "sweep.json" in line]
    assert "resume=true" in line


@pytest.mark.parametrize("harm", [*FILE_HARMS, "deleted"])
def test_the_plan_of_a_sweep_that_runs_is_not_lost_with_its_file(
    day: Path, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SweepFolder, "_held", {})
    folder, file = SweepFolder(day / "3"), day / "3" / "sweep.json"
    plan = folder.read()
    folder.hold(plan)
    file.unlink() if harm == "deleted" else FILE_HARMS[harm](file)
    assert folder.exists
    assert folder.read().planned("0000") == TRIAL
    assert folder.read() == plan
    if harm != "a folder":
        folder.end(Outcome.finished, [])
        assert json.loads(file.read_text())["record"]["outcome"] == "finished"
    assert plan.record.outcome == RUNNING


@pytest.mark.parametrize("harm", FILE_HARMS)
@pytest.mark.parametrize("name", ["idle.json", "0000/seen.json", "0000/idle.jsonl"])
def test_a_block_whose_draw_at_rest_cannot_be_read_is_measured_again(day: Path, name: str, harm: str) -> None:
    card = Card(index=0, uuid="u", name="c", total_bytes=1, compute_capability=(9, 0), driver="d")
    placement = Placement(cards=(card,))
    keep_for_block(day / "3" / "0000", placement, 0, this_process())
    watched = of_block(day / "3", placement, 0, this_process())
    assert watched == (IDLE, SAMPLES)
    FILE_HARMS[harm](day / "3" / name)
    watched = of_block(day / "3", placement, 0, this_process())
    torn = name.endswith(".jsonl") and harm in TORN
    assert watched is None or (torn and len(watched[1]) < len(SAMPLES))


@pytest.mark.parametrize("harm", FILE_HARMS)
@pytest.mark.parametrize("name", ["trial.json", "seen.json", "events.jsonl", "samples.jsonl", "record.json"])
def test_recompute_names_what_it_cannot_read(
    day: Path, name: str, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    FILE_HARMS[harm](day / "2" / name)
    code = recompute.main([str(day / "2")])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    torn = name.endswith(".jsonl") and harm in TORN
    assert code in (1, 2) or torn or name == "samples.jsonl"
    assert name in said.out + said.err or torn
