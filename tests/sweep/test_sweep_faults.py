"""A sweep whose workers are harmed from outside, each in another way (tests/fakes/saboteur): every point ends as the
one outcome that it is, and resume runs again what was not measured."""

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import Lab, Said, lab_in, save_tiny, some_by_day, store_of, until
from mlflow.entities import Run

SABOTEUR = Path(__file__).parents[1] / "fakes" / "saboteur"
PARENT = "mlflow.parentRunId"
AGAIN = {"killed", "failed", "timed_out"}
"""Outcomes that say nothing about the point itself."""
FAST = {"model": "tiny", "measure": "quick", "method": "lora", "precision": "fp32", "data": "random_tokens"}
HUGE_TENSOR_GIB, HUGE_ARRAY_GIB = 4 * 10**15 / 2**30, 8 * 10**12 / 2**30


@dataclass(frozen=True)
class Case:
    """One point: what is done to its worker, and how it must end."""

    name: str
    outcome: str
    act: str = ""
    where: str = ""
    settings: str = ""
    """Overrides of this point alone."""
    phase: str = ""
    """Where it must be said to have ended; empty: in the phase that `where` names."""
    step: str | None = None
    reason: str = ""
    """A regular expression."""
    asked_gib: float | None = None


def killed(phase: str, step: str | None = None) -> Case:
    return Case(f"SIGKILL {phase}", "killed", "kill", f"in {phase}", step=step, reason="ended by SIGKILL")


CASES = (
    Case("left alone", "finished", phase="done"),
    Case("left alone too", "finished", phase="done"),
    *map(killed, ("start", "data", "model", "evaluation_before")),
    killed("warm_up", step="1"),
    *map(killed, ("window", "evaluation_after", "saving")),
    Case("SIGSEGV", "killed", "segmentation fault", "after step 2", phase="window", step="3", reason="SIGSEGV"),
    Case("SIGTERM", "killed", "terminate", "after step 3", phase="window", step="4", reason="SIGTERM"),
    Case(
        "address space",
        "out_of_memory",
        "little memory",
        "in model",
        settings="model.architecture.vocab_size=100000",
        reason="can't allocate memory: you tried to allocate 102400000 bytes",
        asked_gib=102_400_000 / 2**30,
    ),
    Case(
        "torch",
        "out_of_memory",
        "huge tensor",
        "after step 2",
        phase="window",
        step="3",
        reason="can't allocate memory",
        asked_gib=HUGE_TENSOR_GIB,
    ),
    Case("numpy", "out_of_memory", "huge array", "in data", reason="Unable to allocate", asked_gib=HUGE_ARRAY_GIB),
    Case(
        "quantizer",
        "out_of_memory",
        "starve quantizer",
        "in model",
        settings="model=local model.path=mine method=qlora",
        reason="can't allocate memory",
        asked_gib=HUGE_TENSOR_GIB,
    ),
    Case("Rust library", "out_of_memory", "starve tokenizer", "in data", reason="worker.log|memory allocation"),
    Case("library that bails out", "out_of_memory", "bail out", "in model", reason="worker.log"),
    Case(
        "not a number",
        "diverged",
        settings="optimizer.optim=null optimizer.target=torch.optim.SGD max_grad_norm=0 learning_rate=1e+38",
        phase="window",
        reason=r"the training loss was nan at step (\d+)",
    ),
    Case(
        "rising",
        "diverged",
        # steps up the gradient
        settings="measure.steps=20 measure.loss_spike=0.05 learning_rate=0.3001 optimizer.optim=null "
        "optimizer.target=torch.optim.SGD +optimizer.args.maximize=true",
        phase="window",
        reason=r"rose from .* it began at step (\d+)",
    ),
    Case("hang", "timed_out", "hang", "in data", settings="timeout_minutes=0.1", reason="timeout_minutes=0.1"),
    Case("deaf hang", "timed_out", "hang deaf", "in model", settings="timeout_minutes=0.1", reason="timeout_minutes"),
    Case("exception", "failed", "fault", "after step 3", phase="window", step="4", reason="^RuntimeError: sabotaged$"),
    Case("exit", "failed", "exit", "in model", reason="left with exit code 7"),
)
BY_DAY = [
    case
    for case in CASES
    if case.name
    not in {
        *("left alone too", "SIGTERM", "numpy", "rising", "deaf hang"),
        *(f"SIGKILL {phase}" for phase in ("start", "model", "evaluation_before", "evaluation_after")),
    }
]
"""Of each kind of end one, and of kills those in the phases that differ most."""
RATES = {case: f"{number / 1000:g}" for number, case in enumerate(CASES, start=1)}
"""The learning rate is what tells the points apart."""
for _case in CASES:
    if said := re.search(r"learning_rate=(\S+)", _case.settings):
        RATES[_case] = said[1]


@dataclass(frozen=True)
class Look:
    """What a command said, and what there was in its folder when it had ended."""

    cases: Sequence[Case]
    folder: Path
    said: Said
    parents: list[Run]
    trials: list[Run]
    times: dict[Path, int]
    """When each record on disk was written."""

    def run_of(self, case: Case) -> Run:
        [run] = [run for run in self.trials if run.data.params["learning_rate"] == RATES[case]]
        return run

    def folder_of(self, case: Case) -> Path:
        return Path(self.run_of(case).data.tags["folder"])


def look(cases: Sequence[Case], folder: Path, said: Said) -> Look:
    _, runs = store_of(folder)
    return Look(
        cases=cases,
        folder=folder,
        said=said,
        parents=[run for run in runs if PARENT not in run.data.tags],
        trials=[run for run in runs if PARENT in run.data.tags],
        times={path: path.stat().st_mtime_ns for path in folder.glob("multirun/*/*/*/record.json")},
    )


def command(cases: Sequence[Case], folder: Path, *more: str, **environment: str) -> Look:
    lab = lab_in(folder)
    return look(cases, folder, lab("--config-dir", "own", "sweep=harmed", *more, OMP_NUM_THREADS="1", **environment))


@pytest.fixture(scope="module")
def harmed(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Look:
    """The sweep with the saboteur at work."""
    cases = CASES if request.config.getoption("--nightly") else BY_DAY
    folder = tmp_path_factory.mktemp("harmed")
    save_tiny(folder / "mine")
    points = [f"learning_rate={RATES[case]} {case.settings}" for case in cases]
    preset = {
        "defaults": [{f"override /{group}": option} for group, option in FAST.items()],
        "seq_len": 64,
        "data": {"rows": 16},
        "hydra": {"mode": "MULTIRUN", "sweeper": {"points": points}},
    }
    (folder / "own" / "sweep").mkdir(parents=True)
    (folder / "own" / "sweep" / "harmed.yaml").write_text("# @package _global_\n" + yaml.safe_dump(preset))
    plan = folder / "sabotage.json"
    plan.write_text(json.dumps({RATES[case]: [case.act, case.where] for case in cases if case.act}))
    path = os.pathsep.join([str(SABOTEUR), *filter(None, [os.environ.get("PYTHONPATH")])])
    return command(cases, folder, PYTHONPATH=path, SABOTAGE=str(plan))


@pytest.fixture(scope="module")
def resumed(harmed: Look) -> Look:
    """The same command again, with nobody to harm it."""
    return command(harmed.cases, harmed.folder, "resume=true", "timeout_minutes=5")


@pytest.mark.parametrize("case", some_by_day(CASES, BY_DAY), ids=lambda case: case.name)
def test_each_point_ends_as_what_it_is(harmed: Look, case: Case) -> None:
    run = harmed.run_of(case)
    tags = run.data.tags
    assert tags["outcome"] == case.outcome, tags.get("reason")
    assert run.info.status == {"finished": "FINISHED", "killed": "KILLED"}.get(case.outcome, "FAILED")
    assert tags["phase"] == (case.phase or case.where.removeprefix("in "))
    found = re.search(case.reason, tags.get("reason", ""))
    assert found, tags.get("reason")
    step = found[1] if found.groups() else case.step
    if step is not None:
        assert tags["step"] == step
    asked = run.data.metrics.get("out_of_memory/asked_gib")
    assert asked == (None if case.asked_gib is None else pytest.approx(case.asked_gib, rel=0.01))


def test_a_phase_before_training_has_no_step(harmed: Look) -> None:
    phases = {run.data.tags["phase"] for run in harmed.trials if "step" in run.data.tags}
    assert phases == {"warm_up", "window"}


def test_every_point_has_one_run_below_the_one_parent_and_none_is_running(harmed: Look) -> None:
    assert harmed.said.code == 1, harmed.said.text
    [parent] = harmed.parents
    rates = Counter(run.data.params["learning_rate"] for run in harmed.trials)
    assert rates == dict.fromkeys([RATES[case] for case in harmed.cases], 1)
    assert {run.data.tags[PARENT] for run in harmed.trials} == {parent.info.run_id}
    assert parent.info.status == "FINISHED"
    metrics = parent.data.metrics.items()
    counted = {name: n for name, n in metrics if name.startswith("sweep/") and name != "sweep/trials" and n}
    assert counted == {f"sweep/{name}": n for name, n in Counter(r.data.tags["outcome"] for r in harmed.trials).items()}
    assert parent.data.metrics["sweep/trials"] == len(harmed.cases)


def test_what_failed_by_an_exception_left_its_traceback(harmed: Look) -> None:
    [fault] = [case for case in harmed.cases if case.act == "fault"]
    assert "in fault\n" in (harmed.folder_of(fault) / "traceback.txt").read_text()
    left = {path.parent for path in harmed.folder.glob("multirun/*/*/*/traceback.txt")}
    assert left <= {Path(run.data.tags["folder"]) for run in harmed.trials if run.data.tags["outcome"] == "failed"}


def test_what_was_measured_before_the_end_is_kept(harmed: Look) -> None:
    client, _ = store_of(harmed.folder)
    steps = {
        case.name: len(client.get_metric_history(harmed.run_of(case).info.run_id, "Steps/loss"))
        for case in harmed.cases
        if case.where.startswith("after step")
    }
    assert steps.keys() >= {"SIGSEGV", "torch", "exception"}
    assert steps == {name: {"SIGSEGV": 2, "SIGTERM": 3, "torch": 2, "exception": 3}[name] for name in steps}


def test_no_worker_is_left_behind(harmed: Look) -> None:
    until(lambda: not still_there(harmed.folder), "the end of every process", seconds=30)


def still_there(folder: Path) -> list[psutil.Process]:
    """Processes that were started in this folder; a dead one is nowhere."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(folder):
                found.append(process)
    return found


def test_a_person_is_told_each_reason_and_what_to_type(harmed: Look) -> None:
    out = harmed.said.out
    for run in harmed.trials:
        if run.data.tags["outcome"] != "finished":
            assert out.count(run.data.tags["reason"]) >= 2, "in the trial's line, and below the table"
    rows = re.findall(r"^│.*│ (\w+) +│", out, re.MULTILINE)
    ended = [row for row in rows if row in {case.outcome for case in CASES}]
    assert Counter(ended) == Counter(run.data.tags["outcome"] for run in harmed.trials)
    assert "add resume=true to the same command" in out
    assert "Traceback" not in harmed.said.text


def test_nothing_is_said_to_be_left_when_the_last_trial_is_over(harmed: Look) -> None:
    last = re.findall(rf"^\[\d+/{len(harmed.cases)}\] .+$", harmed.said.out, re.MULTILINE)[-1]
    assert not re.search(r"\d (s|min|h) left", last), last


def test_resume_runs_again_what_was_not_measured_and_nothing_else(harmed: Look, resumed: Look) -> None:
    assert resumed.said.code == 0, resumed.said.text
    known = {run.info.run_id for run in harmed.trials}
    new = [run for run in resumed.trials if run.info.run_id not in known]
    again = [run for run in harmed.trials if run.data.tags["outcome"] in AGAIN]
    assert len(again) > len(harmed.cases) // 3
    assert Counter(r.data.params["learning_rate"] for r in new) == Counter(
        r.data.params["learning_rate"] for r in again
    )
    assert {(run.info.status, run.data.tags["outcome"]) for run in new} == {("FINISHED", "finished")}
    assert {run.data.tags["fingerprint"] for run in new} == {run.data.tags["fingerprint"] for run in again}


def test_resume_leaves_what_was_there_as_it_was(harmed: Look, resumed: Look) -> None:
    assert harmed.times.items() <= resumed.times.items()
    before = {run.info.run_id: (run.info.status, run.info.end_time, run.data.tags["outcome"]) for run in harmed.trials}
    after = {run.info.run_id: (run.info.status, run.info.end_time, run.data.tags["outcome"]) for run in resumed.trials}
    assert before.items() <= after.items()
    again = {path.parent.name for path in resumed.times.keys() - harmed.times.keys()}
    assert again == {
        f"{Path(run.data.tags['folder']).name}-2" for run in harmed.trials if run.data.tags["outcome"] in AGAIN
    }


def test_resume_stays_below_the_same_parent_and_leaves_nothing_running(harmed: Look, resumed: Look) -> None:
    [parent] = resumed.parents
    assert parent.info.run_id == harmed.parents[0].info.run_id
    assert {run.data.tags[PARENT] for run in resumed.trials} == {parent.info.run_id}
    assert parent.info.status == "FINISHED"
    assert not [run for run in resumed.trials if run.info.status == "RUNNING"]


def test_after_resume_the_parent_counts_no_outcome_that_no_trial_has_any_more(resumed: Look) -> None:
    [parent] = resumed.parents
    latest = {run.data.tags["trial"]: run for run in sorted(resumed.trials, key=lambda run: run.info.start_time)}
    counts = {f"sweep/{outcome}": n for outcome, n in Counter(r.data.tags["outcome"] for r in latest.values()).items()}
    metrics = {name: n for name, n in parent.data.metrics.items() if name != "sweep/trials" and n}
    assert (metrics, parent.data.metrics["sweep/trials"]) == (counts, len(resumed.cases))


def test_resume_gives_what_timed_out_the_time_that_is_asked_for_now(harmed: Look, resumed: Look) -> None:
    slow = [harmed.folder_of(case) for case in harmed.cases if case.outcome == "timed_out"]
    configs = [yaml.safe_load((folder.parent / f"{folder.name}-2" / "config.yaml").read_text()) for folder in slow]
    assert {config["timeout_minutes"] for config in configs} == {5}


@pytest.mark.parametrize(
    "axes",
    [("repeats=1000000000",), ("repeats=1000", "seed=range(0,11)"), ("seed=range(1,200)", "batch_size=range(1,200)")],
)
def test_a_sweep_beyond_sense_is_refused_before_it_is_planned(lab: Lab, tmp_path: Path, axes: tuple[str, ...]) -> None:
    said = lab("-m", "model=tiny", "data=random_tokens", "seq_len=32", *axes)
    assert said.code == 2, said.text
    assert "at most 1,000" in said.err or "10,000 is the most" in said.err
    assert not (tmp_path / "multirun").exists()
