"""Every figure of a run calculated again, through the real command line, from what real trials stored."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Said, give_store, lab_in, store_of
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from lora_lab.config import TrackingConfig, TrialConfig
from lora_lab.events import Ended, Evaluated, Event, PhaseBegan, Step, WindowClosed, WindowOpened
from lora_lab.outcome import End, Outcome
from lora_lab.phase import Phase
from lora_lab.recompute import main
from lora_lab.store.finishing import finish
from lora_lab.store.outbox import Outbox
from lora_lab.store.process_id import Owner, this_process
from lora_lab.store.record import Record
from lora_lab.store.recovery import recover
from lora_lab.store.trial_folder import Manifest, TrialFolder
from lora_lab.telemetry.host_facts import HostFacts, Idle
from lora_lab.telemetry.idle_draw import idle_draw
from lora_lab.telemetry.sampler import Sample

SABOTEUR = Path(__file__).parent / "fakes" / "saboteur"
STORED = Path(__file__).parents[1] / "benchmarks" / "results" / "h100" / "trial"
AGREES = "all recomputed the same, to the last digit"
GROUPS = {"model": "tiny", "measure": "quick", "method": "lora", "precision": "fp32", "data": "random_tokens"}
POINTS = {
    "finished": "learning_rate=0.001",
    "killed": "learning_rate=0.002",
    "out_of_memory": "learning_rate=0.003",
    "diverged": "learning_rate=1e38 optimizer.optim=null optimizer.target=torch.optim.SGD max_grad_norm=0",
}
"""A point for each way to end; the saboteur kills the second and starves the third."""
SABOTAGE = {"0.002": ["kill", "after step 3"], "0.003": ["huge tensor", "after step 3"]}


def recompute(where: Path, *arguments: str) -> Said:
    return lab_in(where, "lora_lab.recompute")(*arguments)


Again = Callable[..., Said]


@pytest.fixture
def again(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Again:
    """The same command in this process, which has MLflow imported."""
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: Said(main([str(argument) for argument in arguments]), *capsys.readouterr())


def differing(said: Said) -> dict[str, tuple[str, str]]:
    """What is said to differ, as recorded and as recomputed."""
    rows = (line.strip("│").split("│") for line in said.out.splitlines() if line[:1] == "│")
    return {name.strip(): (there.strip(), here.strip()) for name, there, here in rows}


def assert_refused(said: Said, *words: str) -> None:
    assert said.code == 2, said.text
    assert [word for word in words if word not in said.err] == [], said.err
    assert "Traceback" not in said.text
    assert said.out == ""


@dataclass(frozen=True)
class Made:
    """A sweep whose trials have ended in every way, and its store."""

    folder: Path
    runs: dict[str, Run]
    """Of the trials, by outcome."""
    above: Run

    def trial(self, outcome: str) -> Path:
        return Path(self.runs[outcome].data.tags["folder"])

    @property
    def store(self) -> str:
        return f"sqlite:///{self.folder}/mlruns/mlflow.db"

    def copy(self, to: Path) -> Path:
        """The finished trial's folder, to be changed."""
        return Path(shutil.copytree(self.trial("finished"), to / "copy", ignore=shutil.ignore_patterns("adapter")))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    preset = {
        "defaults": [{f"override /{group}": option} for group, option in GROUPS.items()],
        "seq_len": 64,
        "data": {"rows": 16},
        "hydra": {"mode": "MULTIRUN", "sweeper": {"points": list(POINTS.values())}},
    }
    (folder / "own" / "sweep").mkdir(parents=True)
    (folder / "own" / "sweep" / "ends.yaml").write_text("# @package _global_\n" + yaml.safe_dump(preset))
    plan = folder / "sabotage.json"
    plan.write_text(json.dumps(SABOTAGE))
    path = os.pathsep.join([str(SABOTEUR), *filter(None, [os.environ.get("PYTHONPATH")])])
    said = lab_in(folder)("--config-dir", "own", "sweep=ends", PYTHONPATH=path, SABOTAGE=str(plan), OMP_NUM_THREADS="1")
    assert said.code == 1, said.text
    runs = store_of(folder)[1]
    [above] = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    return Made(folder, {run.data.tags["outcome"]: run for run in runs if run is not above}, above)


@pytest.mark.parametrize("outcome", POINTS)
def test_every_figure_of_a_run_follows_from_what_it_stored(made: Made, outcome: str) -> None:
    run = made.runs[outcome]
    by_id = recompute(made.folder, run.info.run_id)
    assert (by_id.code, by_id.err) == (0, ""), by_id.text
    by_folder = recompute(made.folder, str(made.trial(outcome)))
    assert by_folder == by_id
    told = re.fullmatch(rf"(\d+) figures and reasons from (\d+) events and 0 samples: {AGREES}\n", by_id.out)
    assert told, by_id.out
    reasons = [tag for tag in run.data.tags if tag.startswith("absent.")]
    assert int(told[1]) > len(run.data.metrics) + len(reasons), "the verdicts too"
    assert int(told[2]) == len((made.trial(outcome) / "events.jsonl").read_text().splitlines())


def test_from_anywhere_with_the_stores_address(made: Made, tmp_path: Path) -> None:
    said = recompute(tmp_path, made.runs["finished"].info.run_id, "--store", made.store)
    assert (said.code, AGREES in said.out) == (0, True), said.text


def test_a_stored_run_of_an_h100_still_gives_the_figures_that_were_recorded() -> None:
    assert STORED.is_dir()
    said = recompute(STORED.parent, str(STORED))
    assert (said.code, said.err) == (0, ""), said.text
    assert AGREES in said.out
    metrics = json.loads((STORED / "record.json").read_text())["metrics"]
    assert metrics["energy/joules_per_token"] > 0, "of a card, not of a CPU"


Line = dict[str, Any]
Change = Callable[[list[Line]], None]


def lines_of(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, lines: list[Line]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def the_next_number(place: int, key: str) -> Change:
    """The smallest change there is."""

    def change(lines: list[Line]) -> None:
        lines[place][key] = math.nextafter(lines[place][key], math.inf)

    return change


def one_more(place: int, key: str) -> Change:
    def change(lines: list[Line]) -> None:
        lines[place][key] += 1

    return change


SPEED = {
    "throughput/tokens_per_second",
    "throughput/seconds_per_10k_tokens",
    "tokens/real_share",
    "flops/model_tflop_per_second",
    "flops/mfu",
    "flops/per_token",
    "flops/per_token_attention_causal",
    "flops/per_token_attention_square",
}
SAMPLES = {"throughput/samples_per_second", "efficientllm/st_samples_per_second_per_parameter"}


@pytest.mark.parametrize(
    ("kind", "change", "figures"),
    [
        ("Evaluated", the_next_number(0, "loss"), {"loss/eval_before"}),
        ("Evaluated", the_next_number(1, "loss"), {"loss/eval"}),
        ("Step", one_more(2, "loss"), {"loss/train"}),
        ("Step", one_more(3, "loss"), {"loss/train", "step/loss"}),
        ("Step", one_more(2, "rows"), SAMPLES),
        ("Step", one_more(2, "real"), SPEED),
        ("Ended", one_more(0, "peak_host_bytes"), {"host/peak_gib"}),
        ("DataCounted", one_more(0, "rows_truncated"), {"data/rows_truncated"}),
        ("MatmulRate", one_more(0, "flops_per_second"), {"flops/matmul_tflop_per_second", "flops/mfu", "flops/hfu"}),
    ],
)
def test_a_changed_event_is_told_by_the_figures_made_of_it(
    again: Again, made: Made, tmp_path: Path, kind: str, change: Change, figures: set[str]
) -> None:
    folder = made.copy(tmp_path)
    lines = lines_of(folder / "events.jsonl")
    change([line for line in lines if line["event"] == kind])
    write_lines(folder / "events.jsonl", lines)
    said = again(folder)
    assert (said.code, set(differing(said))) == (1, figures), said.text


def test_both_numbers_are_told_to_the_last_digit(again: Again, made: Made, tmp_path: Path) -> None:
    folder = made.copy(tmp_path)
    lines = lines_of(folder / "events.jsonl")
    said = [line for line in lines if line["event"] == "Evaluated"]
    before = said[1]["loss"]
    the_next_number(1, "loss")(said)
    write_lines(folder / "events.jsonl", lines)
    assert differing(again(folder)) == {"loss/eval": (repr(before), repr(said[1]["loss"]))}


def test_a_figure_that_is_there_no_more_is_told_with_the_reason_that_stands_in_its_place(
    again: Again, made: Made, tmp_path: Path
) -> None:
    folder = made.copy(tmp_path)
    lines = lines_of(folder / "events.jsonl")
    write_lines(folder / "events.jsonl", [line for line in lines if line.get("step") != 3])
    said = again(folder)
    assert said.code == 1
    found = differing(said)
    there, here = found["throughput/tokens_per_second"]
    assert (float(there) > 0, here) == (True, "")
    assert found["absent.throughput/tokens_per_second"] == ("", "the measured window was not completed")


def in_window(folder: Path) -> tuple[list[Line], list[Line]]:
    """The readings, and those of them that fell into the window."""
    events, samples = lines_of(folder / "events.jsonl"), lines_of(folder / "samples.jsonl")
    [start] = [event["t"] for event in events if event["event"] == "WindowOpened"]
    [end] = [event["t"] for event in events if event["event"] == "WindowClosed"]
    return samples, [sample for sample in samples if start < sample["t"] < end]


MEMORY = {"vram/peak_device_gib", "vram/steady_device_gib", "vram/other_gib", "efficientllm/amu"}


@pytest.mark.parametrize(
    ("key", "by", "figures"),
    [("used_bytes", 2**30, MEMORY), ("memory_mhz", 1e9, set()), ("sm_mhz", 30.0, {"card/sm_clock_spread"})],
)
def test_a_changed_reading_is_told_by_the_figures_made_of_it(
    again: Again, tmp_path: Path, key: str, by: float, figures: set[str]
) -> None:
    """One reading within the window, neither the last nor, for a median, one that decides."""
    folder = Path(shutil.copytree(STORED, tmp_path / "copy"))
    samples, inside = in_window(folder)
    highest = max((sample for sample in inside[:-5] if key in sample), key=lambda sample: sample[key])
    highest[key] += by
    write_lines(folder / "samples.jsonl", samples)
    said = again(folder)
    assert (said.code, set(differing(said))) == (int(bool(figures)), figures), said.text


@pytest.mark.parametrize(
    ("path", "figures"),
    [
        (("stated", "price_per_kwh"), ("cost/card_per_million_tokens",)),
        (("used_before_bytes",), ("vram/other_gib",)),
        (("card_bytes",), ("efficientllm/amu",)),
        (("metrics", "card/start_celsius"), ("card/start_celsius",)),
        (("metrics", "time/waiting_seconds"), ("time/waiting_seconds", "overhead/before_first_step_seconds")),
        (("no_cpu_sensor",), ("absent.energy/cpu_joules_per_token",)),
    ],
    ids=".".join,
)
def test_what_the_parent_saw_is_told_by_the_figures_made_of_it(
    again: Again, tmp_path: Path, path: tuple[str, ...], figures: tuple[str, ...]
) -> None:
    folder = Path(shutil.copytree(STORED, tmp_path / "copy"))
    seen = json.loads((folder / "seen.json").read_text())
    node = seen
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] += "!" if isinstance(node[path[-1]], str) else 1
    (folder / "seen.json").write_text(json.dumps(seen))
    said = again(folder)
    assert (said.code, set(differing(said))) == (1, set(figures)), said.text


def test_a_reason_that_a_run_lacks_is_told_but_of_one_whose_version_did_not_know_the_figure(
    again: Again, made: Made, tmp_path: Path
) -> None:
    folder = made.copy(tmp_path)
    record = json.loads((folder / "record.json").read_text())
    name = "absent.throughput/kernel_seconds"
    del record["tags"][name]
    (folder / "record.json").write_text(json.dumps(record))
    said = again(folder)
    assert (said.code, set(differing(said))) == (1, {name}), said.text
    record["tags"]["code.telemetry"] = "of another version"
    (folder / "record.json").write_text(json.dumps(record))
    said = again(folder)
    assert (said.code, AGREES in said.out) == (0, True), said.text


def test_a_run_that_is_not_in_the_store_or_is_no_trial_is_refused(again: Again, made: Made) -> None:
    unknown = "0" * 32
    assert_refused(again(unknown, "--store", made.store), unknown, "not found")
    assert_refused(again(made.above.info.run_id, "--store", made.store), "not a trial", "name one of its trials")
    client = MlflowClient(tracking_uri=made.store)
    foreign = client.create_run(made.above.info.experiment_id).info.run_id
    assert_refused(again(foreign, "--store", made.store), foreign, "not a trial of lora_lab")


def test_the_beginning_of_an_id_will_do(again: Again, made: Made) -> None:
    whole = made.runs["finished"].info.run_id
    assert again(whole[:12], "--store", made.store) == again(whole, "--store", made.store)
    assert_refused(again("zzz", "--store", made.store), "begins with 'zzz'")


def test_an_id_is_looked_up_in_the_folders_before_the_store(
    again: Again, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial of tracking=none is in no store."""
    monkeypatch.chdir(made.folder)
    record = TrialFolder(made.trial("finished")).record()
    assert record is not None
    for name in (record.id, record.id[:12], made.runs["finished"].info.run_id):
        assert AGREES in again(name).out
    ids = [name for run in made.runs.values() for name in (run.info.run_id, run.data.tags["record_id"])]
    runs_of = {letter: {name for name in ids if name.startswith(letter)} for letter in {name[0] for name in ids}}
    for letter, found in runs_of.items():
        if len(found) > 2:  # of two trials at least
            assert_refused(again(letter), "Give more characters")
    assert_refused(again("zzz"), "zzz")
    assert_refused(again(""), "RUN is empty")


def test_a_sweep_that_runs_still_is_no_trial_either(again: Again, made: Made) -> None:
    client = MlflowClient(tracking_uri=made.store)
    tags = {name: text for name, text in made.above.data.tags.items() if name != "outcome"}
    running = client.create_run(made.above.info.experiment_id, tags=tags).info.run_id
    assert_refused(again(running, "--store", made.store), "not a trial of lora_lab")


def test_a_folder_without_a_trial_is_refused(again: Again, made: Made, tmp_path: Path) -> None:
    assert_refused(again(tmp_path), "holds no record of a trial")
    assert_refused(again(made.trial("finished").parent), "holds no record of a trial")


@pytest.mark.parametrize(
    ("store", "words"),
    [
        ((), ("neither a folder nor", "mlruns/mlflow.db", "--store URI")),
        (("sqlite:///missing.db",), ("no store at sqlite:///missing.db",)),
        (("sqlite:////no/such/folder/mlflow.db",), ("no store at",)),
        (("sqlite:///empty.db",), ("no store at",)),
        (("",), ("not the address of a store", "sqlite:////")),
        (("mlruns",), ("mlruns is not the address of a store", "sqlite:////")),
        (("http://127.0.0.1:9",), ("http://127.0.0.1:9 was not reached",)),
        (("http://me:hunter2@127.0.0.1:9",), ("was not reached",)),
        (("nonsense://x",), ("nonsense",)),
    ],
    ids=lambda value: value[0] if value and len(value) == 1 else "",
)
def test_a_store_that_is_not_there_is_refused_at_once_and_not_made(
    tmp_path: Path,
    again: Again,
    monkeypatch: pytest.MonkeyPatch,
    store: tuple[str, ...],
    words: Any,
) -> None:
    (tmp_path / "empty.db").touch()
    monkeypatch.chdir(tmp_path)
    arguments = ["0" * 32, *(("--store", *store) if store else ())]
    said = again(*arguments)
    assert_refused(said, *words)
    assert "hunter2" not in said.text
    assert [path.name for path in tmp_path.iterdir()] == ["empty.db"]
    assert (tmp_path / "empty.db").stat().st_size == 0


def test_a_run_whose_files_the_store_has_not_got_is_refused_by_name(again: Again, made: Made) -> None:
    client = MlflowClient(tracking_uri=made.store)
    tags = made.runs["finished"].data.tags
    bare = client.create_run(made.above.info.experiment_id, tags={"outcome": tags["outcome"]}).info.run_id
    client.log_dict(bare, {}, "trial.json")
    assert_refused(again(bare, "--store", made.store), f"{bare} holds no seen.json, events.jsonl, samples.jsonl")


@pytest.mark.parametrize("name", ["trial.json", "seen.json", "record.json"])
@pytest.mark.parametrize("content", ["", "{}", "[1]", "7", "\0}{"])
def test_a_damaged_file_is_refused_or_differs_and_is_never_a_traceback(
    made: Made, tmp_path: Path, again: Again, name: str, content: str
) -> None:
    folder = made.copy(tmp_path)
    (folder / name).write_text(content)
    said = again(folder)
    if said.code == 2:
        assert_refused(said, str(folder))
    else:
        assert (said.code, name) == (1, "seen.json"), said.text


OLD_SAMPLE = {"t": 1.0, "energy_joules": 5.0, "power_watts": 70.0, "used_bytes": 2**30, "temperature_celsius": 40.0}
"""As the version before wrote them."""


def test_a_trial_of_the_version_before_is_refused_in_plain_words(again: Again, made: Made, tmp_path: Path) -> None:
    folder = made.copy(tmp_path)
    (folder / "seen.json").unlink()
    write_lines(folder / "samples.jsonl", [OLD_SAMPLE])
    said = again(folder)
    assert_refused(said, f"{folder} holds no seen.json", "of a version that did not keep all")


STEPS = 3


def told_by(folder: Path, loss: float = 2.0, owner: Owner | None = None) -> tuple[TrialFolder, Manifest, list[Event]]:
    """A trial that has been through its window, as it lies on disk before anybody has summarised it."""
    events: list[Event] = [
        PhaseBegan(t=9.0, phase=Phase.window.value),
        WindowOpened(t=10.0, after_step=0),
        *(
            Step(t=10.0 + n, step=n, seconds=1.0, loss=loss, rows=2, slots=64, real=50, trained=20, skipped=False)
            for n in range(1, STEPS + 1)
        ),
        WindowClosed(t=10.0 + STEPS, after_step=STEPS),
        Evaluated(t=20.0, phase=Phase.evaluation_after.value, loss=-loss, rows=1, tokens=9),
    ]
    asked = Manifest(
        owner=owner or this_process(),
        t=8.0,
        tracking=TrackingConfig(root=str(folder.parents[2] / "mlruns")),
        record=Record(name="r", params={"seed": "0"}, tags={"device": "cpu", "point": "p"}),
        unix_minus_monotonic=1e9,
    )
    there = TrialFolder(folder)
    there.begin(asked, TrialConfig(), {}, HostFacts(no_sensor="no card"))
    for event in events:
        there.note_event(event)
    return there, asked, events


@pytest.mark.parametrize("loss", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_no_number_recomputes_as_such(
    tmp_path: Path, empty_store: Path, again: Again, loss: float
) -> None:
    """MLflow keeps the largest number there is in the place of infinity."""
    give_store(tmp_path, empty_store)
    there, asked, events = told_by(tmp_path / "multirun" / "day" / "time", loss)
    said = Ended(t=21.0, outcome="diverged", reason="r", step=1)
    there.note_event(said)
    end = End(outcome=Outcome.diverged, reason="r", step=1)
    record, _ = finish(there, asked, end, [*events, said], [], HostFacts(no_sensor="no card"))
    run_id = Outbox(asked.tracking).deliver_trial(there, record)
    assert run_id is not None
    database = tmp_path / "mlruns" / "mlflow.db"
    kept = MlflowClient(tracking_uri=f"sqlite:///{database}").get_run(run_id).data.metrics
    assert {name for name, value in kept.items() if not abs(value) < 1e300} == {"loss/train", "loss/eval", "Steps/loss"}
    for where in ([str(there.path)], [run_id, "--store", f"sqlite:///{database}"]):
        assert again(*where).code == 0, where


def drawing(watts: float, start: float, end: float) -> list[Sample]:
    """Readings of a card, twenty a second."""
    times = [n / 20 for n in range(round(20 * start), round(20 * end))]
    return [Sample(t=t, energy_joules=1e6 + watts * t) for t in times]


def test_net_energy_follows_from_the_readings_at_rest(again: Again, tmp_path: Path) -> None:
    there, asked, events = told_by(tmp_path / "multirun" / "day" / "time")
    at_rest, working = drawing(60.0, 1.0, 7.0), drawing(100.0, 9.0, 14.0)
    watts, error_watts, source = idle_draw(2.0, 6.0, at_rest)
    idle = Idle(watts=watts, error_watts=error_watts, source=source, start=2.0, end=6.0, state="s", measured_ms=1)
    seen = HostFacts()
    there.keep_idle(idle, at_rest, seen)
    for sample in working:
        there.note_sample(sample)
    record, _ = finish(there, asked, End(outcome=Outcome.finished, reason=""), events, working, seen)
    assert record.metrics["energy/net_joules"] == pytest.approx((100.0 - 60.0) * STEPS)
    assert again(there.path).code == 0

    readings = lines_of(there.path / "idle.jsonl")
    for reading in readings[len(readings) // 2 :]:
        reading["energy_joules"] += 0.5
    write_lines(there.path / "idle.jsonl", readings)
    of_idle = {"energy/idle_watts", "energy/net_joules", "energy/net_joules_per_token"}
    said = again(there.path)
    assert (said.code, set(differing(said))) == (1, of_idle), said.text
    (there.path / "idle.jsonl").unlink()
    said = again(there.path)
    assert (said.code, "idle.jsonl" in said.err) == (2, True), said.text


def killed_before(folder: Path, of_the_version_before: bool) -> TrialFolder:
    """A trial whose process was killed in the middle of a line."""
    gone = replace(this_process(), boot_id="earlier")
    there, _, _ = told_by(folder, owner=gone)
    if of_the_version_before:
        (folder / "seen.json").unlink()
        write_lines(folder / "samples.jsonl", [OLD_SAMPLE, OLD_SAMPLE])
    else:
        there.note_sample(Sample(t=10.5, average_watts=70.0))
    for name in ("events.jsonl", "samples.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"t": 1')
    return TrialFolder(folder)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # a killed trial closes nothing
@pytest.mark.parametrize("old", [False, True], ids=["this version", "the version before"])
def test_a_killed_trial_is_recovered_by_the_next_start_and_recomputes(
    tmp_path: Path, empty_store: Path, again: Again, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    database = give_store(tmp_path, empty_store)
    there = killed_before(tmp_path / "multirun" / "day" / "time", old)
    monkeypatch.chdir(tmp_path)
    found = recover(Outbox(TrackingConfig(root=str(tmp_path / "mlruns"))))
    assert (found.killed, found.delivered, found.faults) == (1, 1, set())
    record = there.record()
    assert record is not None
    assert record.metrics["loss/eval"] == -2.0
    assert record.tags["outcome"] == "killed"
    reason = record.tags["absent.energy/joules_per_token"]
    assert ("another version" in reason) == old, reason
    for where in ([str(there.path)], [run_of(database), "--store", f"sqlite:///{database}"]):
        assert again(*where).code == 0, where


def run_of(database: Path) -> str:
    """The only run of a store."""
    _, [run] = store_of(database.parents[1])
    return str(run.info.run_id)
