"""A sweep with placement=each_gpu through the real command line: trials run at the same time, one a slot, and are
recorded as those of any other sweep."""

import itertools
import json
import os
import signal
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Said, lab_in, records_in, started, store_of, until, with_fakes
from mlflow.entities import Run

from lora_lab.composition.validation import faults
from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.data_config import DataConfig
from lora_lab.machine import CORES
from lora_lab.options import DataSource, PlacementKind
from lora_lab.placement import Placement
from lora_lab.places_config import PlacementConfig
from lora_lab.sweep import points
from lora_lab.sweep import slots as module
from lora_lab.sweep.side_by_side import Job, run_in_blocks
from lora_lab.sweep.slots import placement_in_sweep, slots_of
from lora_lab.telemetry.nvml import Card
from lora_lab.trial.device_lock import device_lock
from lora_lab.trial.devices import worker_environment
from lora_lab.trial.session import Request
from lora_lab.worker import process

EACH = PlacementKind.each_gpu

FAST = ("model=tiny", "measure=quick", "method=lora", "precision=fp32", "seq_len=32", "data=random_tokens")
SWEEP = ("-m", *FAST, "data.rows=16", "batch_size=1,2", "repeats=2")
TWO = ("placement=each_gpu", "placement.workers=2")
THREE = ("-m", *FAST, "data.rows=16", "learning_rate=1e-4,2e-4,3e-4", *TWO)
SABOTEUR = Path(__file__).parents[1] / "fakes" / "saboteur"
needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two shares need two cores")


@dataclass(frozen=True)
class Ran:
    """A sweep that has ended, as its folder and its store show it."""

    said: Said
    folder: Path

    @property
    def records(self) -> list[dict[str, Any]]:
        """In the order of the trials' numbers."""
        return records_in(self.folder)

    @property
    def runs(self) -> list[Run]:
        return [run for run in store_of(self.folder)[1] if "mlflow.parentRunId" in run.data.tags]

    @property
    def spans(self) -> dict[str, tuple[float, float]]:
        """From the first to the last word of each worker, by the name of the trial's folder."""
        found = {}
        for path in sorted(self.folder.glob("multirun/[!.]*/*/*/events.jsonl")):
            times = [json.loads(line)["t"] for line in path.read_text().splitlines()]
            found[path.parent.name] = min(times), max(times)
        return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Two points twice, two at a time."""
    folder = tmp_path_factory.mktemp("side by side")
    return Ran(lab_in(folder)(*SWEEP, *TWO), folder)


@needs_two_cores
def test_trials_run_at_the_same_time_and_each_is_recorded_once(pair: Ran) -> None:
    assert pair.said.code == 0, pair.said.text
    spans = pair.spans
    assert sorted(spans) == ["0000", "0001", "0002", "0003"]
    for one, other in (("0000", "0001"), ("0002", "0003")):
        assert spans[one][0] < spans[other][1], f"{one} and {other}, of one block, ran at the same time"
        assert spans[other][0] < spans[one][1]
    assert {run.info.status for run in pair.runs} == {"FINISHED"}
    assert sorted(run.data.tags["trial"] for run in pair.runs) == ["0", "1", "2", "3"]
    assert len({run.data.tags["mlflow.parentRunId"] for run in pair.runs}) == 1
    assert [line.partition(":")[0] for line in pair.said.out.splitlines() if line[:1] == "["] == [
        f"[{number}/4] finished" for number in range(1, 5)
    ]


@needs_two_cores
def test_a_block_begins_when_the_one_before_is_over(pair: Ran) -> None:
    spans = pair.spans
    assert max(spans[trial][1] for trial in ("0000", "0001")) < min(spans[trial][0] for trial in ("0002", "0003"))
    ran = [(record["params"]["repeat"], record["params"]["seed"]) for record in pair.records]
    assert ran == [("0", "0")] * 2 + [("1", "1")] * 2


@needs_two_cores
def test_a_record_says_on_which_slot_it_ran_and_who_ran_beside(pair: Ran) -> None:
    cores = {tuple(sorted(Counter(record["tags"]["slot"] for record in pair.records).items()))}
    [((one, first), (other, second))] = cores
    assert (first, second) == (2, 2), "each slot has a trial of each block"
    for number, record in enumerate(pair.records):
        neighbour = number + 1 if number % 2 == 0 else number - 1
        place = other if record["tags"]["slot"] == one else one
        assert record["tags"]["neighbours"] == f"{neighbour:04d} on {place}"
        assert "slots" in record["tags"]["absent.energy/cpu_joules_per_token"], "the CPU's counter is not its own"
        cores = len(os.sched_getaffinity(0)) // 2
        assert record["tags"]["device.cores"] == str(cores)
        assert int(record["tags"]["ran.threads"]) <= cores


@needs_two_cores
def test_a_trial_is_the_same_point_as_one_that_runs_alone(pair: Ran) -> None:
    for record in pair.records:
        assert (record["params"]["placement"], record["params"]["placement.kind"]) == ("one", "one")
        assert "placement" not in record["tags"]["command"], "the command runs this trial alone"


@needs_two_cores
def test_resume_runs_nothing_again(pair: Ran) -> None:
    before = {path: path.stat().st_mtime_ns for path in pair.folder.rglob("record.json")}
    again = lab_in(pair.folder)(*SWEEP, *TWO, "resume=true")
    assert again.code == 0, again.text
    assert "resuming" in again.out
    assert {path: path.stat().st_mtime_ns for path in pair.folder.rglob("record.json")} == before


@needs_two_cores
def test_a_report_takes_the_shares_of_one_cpu_for_one_place(pair: Ran) -> None:
    said = lab_in(pair.folder, module="lora_lab.report")()
    assert said.code == 0, said.text
    assert "2 configurations" in said.out
    assert "reported separately" not in said.out


def events_of(folder: Path) -> list[dict[str, Any]]:
    paths = folder.glob("multirun/[!.]*/*/*/events.jsonl")
    return [json.loads(line) | {"trial": path.parent.name} for path in paths for line in path.read_text().splitlines()]


def hanging(folder: Path) -> dict[str, str]:
    """What makes each trial of THREE hang after its second step."""
    (folder / "sabotage.json").write_text(json.dumps({f"{n * 1e-4:g}": ["hang", "after step 2"] for n in (1, 2, 3)}))
    path = os.pathsep.join([str(SABOTEUR), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "SABOTAGE": str(folder / "sabotage.json")}


def in_window(folder: Path, trials: int) -> bool:
    """Whether that many trials have told their second step."""
    return len({each["trial"] for each in events_of(folder) if each["event"] == "Step" and each["step"] == 2}) >= trials


def workers_of(folder: Path) -> dict[str, int]:
    return {each["trial"]: each["pid"] for each in events_of(folder) if each["event"] == "Ready"}


@needs_two_cores
def test_a_killed_trial_is_recorded_and_the_others_go_on_until_ctrl_c_and_resume_runs_all_again(tmp_path: Path) -> None:
    with started(tmp_path, *THREE, **hanging(tmp_path)) as sweep:
        until(lambda: in_window(tmp_path, 2), "two trials run")
        os.kill(workers_of(tmp_path)["0000"], signal.SIGKILL)
        until(lambda: in_window(tmp_path, 3), "the third has the free slot")
        assert [(r["outcome"], r["tags"]["trial"]) for r in records_in(tmp_path)] == [("killed", "0")]
        os.kill(sweep.pid, signal.SIGINT)
        assert sweep.wait(30) == 130
    reasons = [record["tags"]["reason"].partition(";")[0] for record in records_in(tmp_path)]
    assert reasons == ["the worker was ended by SIGKILL", *["interrupted by Ctrl-C"] * 2]
    assert_all_finish_at_last(tmp_path, killed=3)


@needs_two_cores
@pytest.mark.nightly
def test_no_worker_outlives_a_sweep_that_is_killed_and_resume_runs_all_again(tmp_path: Path) -> None:
    with started(tmp_path, *THREE, **hanging(tmp_path)) as sweep:
        until(lambda: in_window(tmp_path, 2), "two trials run")
        workers = [psutil.Process(pid) for pid in workers_of(tmp_path).values()]
        sweep.kill()
        sweep.wait(30)
        _, alive = psutil.wait_procs(workers, timeout=20)
        assert not alive
    assert_all_finish_at_last(tmp_path, killed=2)


def assert_all_finish_at_last(folder: Path, killed: int) -> None:
    """resume=true runs each trial to its end, once, in the same sweep."""
    said = lab_in(folder)(*THREE, "resume=true")
    assert said.code == 0, said.text
    assert "resuming" in said.out
    runs = [run for run in store_of(folder)[1] if "mlflow.parentRunId" in run.data.tags]
    assert Counter(run.info.status for run in runs) == {"KILLED": killed, "FINISHED": 3}
    assert len({run.data.tags["fingerprint"] for run in runs if run.info.status == "FINISHED"}) == 3
    assert len({run.data.tags["mlflow.parentRunId"] for run in runs}) == 1


@pytest.mark.parametrize(
    ("arguments", "fakes", "words"),
    [
        ((*FAST, *TWO), False, ["placement=each_gpu", "-m", "device=gpu:N"]),
        ((*SWEEP, *TWO, "hydra/launcher=joblib"), False, ["hydra/launcher=joblib"]),
        (("-m", *FAST, "placement=one,each_gpu", "device=cpu", "placement.workers=2"), False, ["placement"]),
        (("-m", *FAST, "batch_size=max", "data.rows=64", "placement=each_gpu"), True, ["batch_size=max", "each_gpu"]),
    ],
)
def test_what_cannot_run_side_by_side_is_refused_before_anything_starts(
    tmp_path: Path, arguments: tuple[str, ...], fakes: bool, words: list[str]
) -> None:
    driver = {"PYTHONPATH": with_fakes(), "FAKE_NVML_CARDS": "2", "FAKE_NVML_NAME": "Twin"} if fakes else {}
    said = lab_in(tmp_path)(*arguments, **driver)
    assert said.code == 2, said.text
    assert [word for word in words if word not in said.err] == [], said.err
    assert "Traceback" not in said.text
    assert not list(tmp_path.rglob("events.jsonl"))
    assert not list(tmp_path.rglob("trial.json"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"placement": PlacementConfig(workers=2)}, ["placement.workers=2", "placement=each_gpu"]),
        ({"placement": PlacementConfig(kind=EACH, workers=2, gpus=2)}, ["placement.gpus", "placement.workers"]),
        ({"placement": PlacementConfig(kind=EACH), "device": "gpu:1"}, ["device=gpu:1"]),
        ({"placement": PlacementConfig(kind=EACH), "device": "GPU-1"}, ["device=GPU-1"]),
        ({"placement": PlacementConfig(kind=EACH), "repeats": "auto", "contrast": "optimizer"}, ["repeats=auto"]),
    ],
)
def test_settings_that_exclude_one_another_are_faults(changes: dict[str, Any], words: list[str]) -> None:
    [fault] = set(faults(replace(TrialConfig(), **changes))) - set(faults(TrialConfig()))
    assert [word for word in words if word not in fault] == [], fault


@pytest.mark.parametrize(
    ("names", "placement", "words"),
    [
        (["Twin", "Twin"], PlacementConfig(kind=EACH, gpus=3), ["placement.gpus=3", "gpu:1 (Twin)"]),
        (["Twin", "Twin"], PlacementConfig(kind=EACH, workers=2), ["placement.workers=2", "device=cpu"]),
        (["Small", "Large"], PlacementConfig(kind=EACH), ["gpu:0 (Small)", "gpu:1 (Large)"]),
        ([], PlacementConfig(kind=EACH), ["for example placement.workers="]),
        ([], PlacementConfig(kind=EACH, gpus=2), ["placement.gpus=2", "placement.workers=2"]),
        ([], PlacementConfig(kind=EACH, workers=1000), ["placement.workers=1000"]),
    ],
)
def test_what_this_machine_has_not_is_refused(
    monkeypatch: pytest.MonkeyPatch, names: list[str], placement: PlacementConfig, words: list[str]
) -> None:
    monkeypatch.setattr(module, "cards_here", lambda: tuple(card(*each) for each in enumerate(names)))
    with pytest.raises(InvalidInput) as refusal:
        slots_of(TrialConfig(placement=placement))
    assert [word for word in words if word not in str(refusal.value)] == [], refusal.value


def card(index: int, name: str) -> Card:
    uuid = f"GPU-{index}"
    return Card(index=index, uuid=uuid, name=name, total_bytes=2**33, compute_capability=(8, 6), driver="570")


def test_only_pairs_of_repeats_auto_have_to_stay_on_one_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "placement_in_sweep", lambda _: Placement(cards=(card(3, "Twin"),)))
    config = TrialConfig(data=DataConfig(source=DataSource.random_tokens))
    assert "device.uuid" not in points.conditions_here(config)
    config.repeats = "auto"
    assert points.conditions_here(config)["device.uuid"] == "GPU-3"


def test_equal_cards_are_slots_in_their_order_and_fewer_may_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cards_here", lambda: tuple(card(index, "Twin") for index in range(4)))
    config = TrialConfig(placement=PlacementConfig(kind=EACH))
    assert [slot.name for slot in slots_of(config)] == ["gpu:0", "gpu:1", "gpu:2", "gpu:3"]
    config.placement.gpus = 2
    assert [slot.placement.cards[0].uuid for slot in slots_of(config)] == ["GPU-0", "GPU-1"]
    assert placement_in_sweep(config).cards[0].uuid == "GPU-0"
    assert slots_of(TrialConfig()) == []


@pytest.mark.nightly
def test_each_card_has_its_own_trials_and_its_own_idle_draw(tmp_path: Path) -> None:
    (tmp_path / "sabotage.json").write_text(json.dumps({"small card": ["1000000", ""]}))  # the CPU does the work
    command = ("-m", *FAST, "data.rows=16", "batch_size=1,2,4", "measure.idle_seconds=1.5", "tracking=none")
    twins = {
        "PYTHONPATH": os.pathsep.join([str(SABOTEUR), with_fakes()]),
        "SABOTAGE": str(tmp_path / "sabotage.json"),
        "FAKE_NVML_CARDS": "2",
        "FAKE_NVML_NAME": "Twin",
    }
    said = lab_in(tmp_path)(*command, "placement=each_gpu", **twins)
    assert said.code == 0, said.text
    [sweep] = [path.parent for path in tmp_path.glob("multirun/*/*/sweep.json")]
    slots = {}
    for record in records_in(tmp_path):
        tags = record["tags"]
        assert tags["device"] == "Twin"
        assert tags["device.uuid"] == f"GPU-{int(tags['slot'].removeprefix('gpu:')):08x}-0000-0000-0000-000000000000"
        slots[tags["trial"]] = tags["slot"]
    assert (slots["0"], slots["1"], len(slots)) == ("gpu:0", "gpu:1", 3)
    assert said.err.count("measuring the idle power of Twin") == 2, "once a card"
    seen = {trial: json.loads((sweep / f"000{trial}" / "seen.json").read_text())["idle"] for trial in slots}
    assert seen["0"]["start"] < seen["1"]["end"], "at the block's start, on both cards at once"
    assert seen["1"]["start"] < seen["0"]["end"]
    earlier = next(trial for trial in ("0", "1") if slots[trial] == slots["2"])
    assert seen["2"] == seen[earlier]
    again = lab_in(tmp_path)(*command, "resume=true", CUDA_VISIBLE_DEVICES="1", **twins)
    assert (again.code, "nothing left to run" in again.out) == (0, True), "done on either card is done"
    report = lab_in(tmp_path, module="lora_lab.report")()
    assert "3 configurations" in report.out, report.text
    assert "2 cards of one kind" in report.out


def test_what_does_not_fit_is_skipped_and_what_a_card_cannot_do_is_recorded_as_ever(tmp_path: Path) -> None:
    """The cards calculate no bf16, and one point is too large for the memory that it may take."""
    command = ("-m", "model=tiny", *FAST[1:2], *FAST[4:], "data.rows=16", "vram_limit_gib=0.3,0.9,2")
    twins = {"PYTHONPATH": with_fakes(), "FAKE_NVML_CARDS": "2", "FAKE_NVML_NAME": "Twin"}
    twins |= {"FAKE_NVML_CAPABILITY": "7.5"}
    said = lab_in(tmp_path)(*command, "measure.idle_seconds=0", "plan=fits", "placement=each_gpu", **twins)
    assert said.code == 3, said.text
    ends = Counter((record["params"]["vram_limit_gib"], record["outcome"]) for record in records_in(tmp_path))
    assert ends == {("2.0", "unsupported"): 1, ("0.9", "unsupported"): 1, ("0.3", "predicted_out_of_memory"): 1}
    statuses = Counter(run.info.status for run in store_of(tmp_path)[1] if "mlflow.parentRunId" in run.data.tags)
    assert sum(statuses.values()) == 3
    assert "RUNNING" not in statuses


def test_ctrl_c_ends_what_waits_for_a_card_in_each_thread(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"temperature": 90}')
    hot = {"PYTHONPATH": with_fakes(), "FAKE_NVML_CARDS": "2", "FAKE_NVML_NAME": "Twin"}
    hot["FAKE_NVML_STATE"] = str(tmp_path / "state.json")
    command = ("-m", *FAST, "data.rows=16", "batch_size=1,2", "placement=each_gpu", "cooldown_celsius=50")
    with started(tmp_path, *command, "tracking=none", **hot) as sweep:
        until(lambda: len(list(tmp_path.glob("multirun/[!.]*/*/*/trial.json"))) == 2, "both were begun")
        os.kill(sweep.pid, signal.SIGINT)
        assert sweep.wait(20) == 130
    assert [record["tags"]["reason"] for record in records_in(tmp_path)] == ["interrupted by Ctrl-C"] * 2


def test_the_cores_are_divided_equally_and_no_core_is_in_two_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 6, 7, 9})
    config = TrialConfig(device="cpu", placement=PlacementConfig(kind=EACH, workers=3))
    shares = slots_of(config)
    assert [share.placement.cores for share in shares] == [(0, 1), (2, 3), (6, 7)]
    assert [share.name for share in shares] == ["cores 0-1", "cores 2-3", "cores 6-7"]
    config.placement.workers = 8
    with pytest.raises(InvalidInput, match=r"placement.workers=8 .*\(7\)"):
        slots_of(config)


@pytest.mark.parametrize(("held", "asked", "waits"), [("0", "", True), ("", "1", True), ("0", "1", False)])
def test_a_share_of_the_cpu_and_a_trial_on_all_of_it_wait_for_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: str, asked: str, waits: bool
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, second = (Placement(cores=tuple(map(int, cores))) for cores in (held, asked))

    class Waited(Exception):
        pass

    def say(text: str) -> None:
        assert f"process {os.getpid()}" in text
        raise Waited

    with device_lock(first, share=False, waiting=pytest.fail):
        try:
            with device_lock(second, share=False, waiting=say):
                waited = False
        except Waited:
            waited = True
    assert waited == waits
    with device_lock(second, share=False, waiting=pytest.fail):
        pass


@pytest.mark.parametrize(("share", "threads"), [({0}, 1), (set(range(64)), 64)])
def test_a_worker_keeps_to_its_cores_and_has_no_more_threads(
    monkeypatch: pytest.MonkeyPatch, share: set[int], threads: int
) -> None:
    import torch

    kept: dict[str, Any] = {}
    monkeypatch.setattr(process.os, "sched_setaffinity", lambda _, cores: kept.update(cores=cores))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: kept.update(threads=number))
    process._keep_to_cores(worker_environment(Placement(cores=tuple(share)))[CORES])
    assert kept == {"cores": share, "threads": threads}
    assert CORES not in worker_environment(Placement())


def test_no_two_of_many_shares_meet() -> None:
    for workers in range(1, len(os.sched_getaffinity(0)) + 1):
        config = TrialConfig(device="cpu", placement=PlacementConfig(kind=EACH, workers=workers))
        shares = [set(slot.placement.cores) for slot in slots_of(config)]
        assert len(shares) == workers
        assert all(not one & other for one, other in itertools.combinations(shares, 2))


class Clock:
    """A runner whose trials end in the order of their times, which tests give; nothing runs."""

    def __init__(self, slots: int, takes: dict[str, float], interrupted_at: int | None = None) -> None:
        self.free, self.now, self._takes, self._ends = slots, 0.0, takes, dict[str, float]()
        self.begun: list[tuple[str, float]] = []
        self._interrupted_at = interrupted_at

    @property
    def running(self) -> int:
        return len(self._ends)

    def submit(self, request: Request) -> None:
        name = request.folder.name
        if len(self.begun) == self._interrupted_at:
            raise KeyboardInterrupt
        assert self.free
        self.free -= 1
        self.begun.append((name, self.now))
        self._ends[name] = self.now + self._takes[name]

    def next_ended(self) -> None:
        name = min(self._ends, key=lambda each: self._ends[each])
        self.now = self._ends.pop(name)
        self.free += 1


def prepared(folder: Path, *names: str) -> dict[str, Request]:
    made = {}
    for name in names:
        (folder / name).mkdir()  # as Hydra does
        made[name] = Request(config=TrialConfig(), choices={}, command="", folder=folder / name)
    return made


def jobs(*blocks: str) -> list[Job]:
    return [Job(number, [name]) for number, block in enumerate(blocks) for name in block]


def test_the_free_slot_takes_the_next_trial_and_a_block_waits_for_the_one_before(tmp_path: Path) -> None:
    requests = prepared(tmp_path, *"abcdef")
    runner = Clock(2, {"a": 5.0, "b": 1.0, "c": 1.0, "d": 1.0, "e": 1.0, "f": 1.0})
    run_in_blocks(runner, jobs("abcd", "ef"), lambda job: requests[job.overrides[0]])
    assert runner.begun == [("a", 0.0), ("b", 0.0), ("c", 1.0), ("d", 2.0), ("e", 5.0), ("f", 5.0)]
    assert (runner.running, runner.free) == (0, 2)


def test_two_slots_take_half_of_the_time_and_a_trial_that_is_refused_takes_none(tmp_path: Path) -> None:
    requests = {**prepared(tmp_path, *"abcdefgh"), "x": None}
    spans = []
    for slots in (1, 2):
        runner = Clock(slots, dict.fromkeys("abcdefgh", 1.0))
        run_in_blocks(runner, jobs("abxcd", "efgh"), lambda job: requests[job.overrides[0]])
        spans.append(runner.now)
    assert spans == [8.0, 4.0]


def test_a_trial_that_ctrl_c_kept_from_beginning_leaves_no_folder(tmp_path: Path) -> None:
    requests = prepared(tmp_path, *"abc")
    runner = Clock(2, dict.fromkeys("abc", 1.0), interrupted_at=2)
    with pytest.raises(KeyboardInterrupt):
        run_in_blocks(runner, jobs("abc"), lambda job: requests[job.overrides[0]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
