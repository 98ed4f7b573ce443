"""What a sweep leaves on disk: its plan, an attempt after another, and how it ended."""

import csv
import shutil
from pathlib import Path

import pytest

from lora_lab.config import TrackingConfig, TrialConfig
from lora_lab.options import TrackingKind
from lora_lab.outcome import End, Outcome
from lora_lab.store.finishing import finish
from lora_lab.store.process_id import this_process
from lora_lab.store.record import RUNNING, Record
from lora_lab.store.sweep_folder import Attempt, Plan, Planned, SweepFolder, outlines
from lora_lab.store.trial_folder import Manifest, TrialFolder
from lora_lab.telemetry.host_facts import HostFacts

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # a killed trial closes nothing

MEASURED = (Outcome.finished, Outcome.out_of_memory, Outcome.diverged, Outcome.unsupported)


def planned(number: int) -> Planned:
    return Planned(
        number=number,
        settings={"batch_size": str(number)},
        asked_place=number,
        repeat=0,
        overrides=[f"batch_size={number}", "seed=0"],
        point=f"p{number}",
        fingerprint=f"f{number}",
    )


def sweep_in(path: Path, *numbers: int) -> SweepFolder:
    folder = SweepFolder(path)
    folder.write(
        Plan(
            owner=this_process(),
            tracking=TrackingConfig(kind=TrackingKind.server, uri="http://host"),
            record=Record(name="sweep", params={"points": "3"}),
            conditions={"p0": {"code": "c"}},
            trials=[planned(number) for number in numbers],
            launched=["0000", "0001-2"],
        )
    )
    return folder


def start(folder: SweepFolder, trial: Planned) -> TrialFolder:
    """One more attempt at a trial, as far as it is written before the worker starts."""
    there = TrialFolder(folder.path / folder.next_attempt(trial))
    there.begin(asked_for(trial), TrialConfig(), {}, HostFacts())
    return there


def asked_for(trial: Planned) -> Manifest:
    record = Record(name=trial.name, params={}, tags={"device": "cpu", "point": trial.point})
    return Manifest(owner=this_process(), t=0.0, tracking=TrackingConfig(), record=record)


def run(folder: SweepFolder, trial: Planned, outcome: Outcome, reason: str = "") -> TrialFolder:
    there = start(folder, trial)
    seen = HostFacts(warnings=["w"], metrics={"m": 1.0})
    finish(there, asked_for(trial), End(outcome=outcome, reason=reason), [], [], seen)
    return there


def test_a_plan_comes_back_as_it_went(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "deep" / "sweep")
    assert not folder.exists
    plan = sweep_in(folder.path, 0, 1, 2).read()
    assert folder.exists
    folder.write(plan)
    assert folder.read() == plan
    assert plan.tracking == TrackingConfig(kind=TrackingKind.server, uri="http://host")
    assert [trial.number for trial in plan.trials] == [0, 1, 2]


def test_the_folder_of_an_attempt_tells_its_trial(tmp_path: Path) -> None:
    folder = sweep_in(tmp_path, 0, 1, 12345)
    for name, number in (("0000", 0), ("0001", 1), ("0001-2", 1), ("0001-13", 1), ("12345", 12345)):
        found = folder.read().planned(name)
        assert found is not None
        assert found.number == number
    for name in ("0002", "1", "00010", "trials.csv", "0001x"):
        assert folder.read().planned(name) is None


def test_every_attempt_has_a_folder_of_its_own(tmp_path: Path) -> None:
    folder = sweep_in(tmp_path, 1)
    trial = planned(1)
    names = [run(folder, trial, Outcome.killed).path.name for _ in range(11)]
    assert names == ["0001", *(f"0001-{n}" for n in range(2, 12))]
    assert all((tmp_path / name / "record.json").is_file() for name in names), "what earlier ones left stays"


@pytest.mark.parametrize("removed", ["0001", "0001-2", "0001-3"])
def test_no_attempt_gets_a_folder_that_is_there(tmp_path: Path, removed: str) -> None:
    """Somebody who needs room takes failed attempts away."""
    folder, trial = sweep_in(tmp_path, 1), planned(1)
    for outcome in (Outcome.failed, Outcome.failed, Outcome.finished):
        run(folder, trial, outcome)
    shutil.rmtree(tmp_path / removed)
    assert not (tmp_path / folder.next_attempt(trial)).exists()
    attempt = folder.attempt(trial)
    assert attempt is not None
    assert attempt.outcome == ("failed" if removed == "0001-3" else "finished")


def test_trials_beyond_ten_thousand_are_not_taken_for_attempts(tmp_path: Path) -> None:
    folder = sweep_in(tmp_path, 1000, 10000)
    run(folder, planned(10000), Outcome.finished)
    assert folder.attempt(planned(1000)) is None
    assert folder.next_attempt(planned(1000)) == "1000"


def test_the_latest_attempt_that_is_over_is_what_counts(tmp_path: Path) -> None:
    folder, trial = sweep_in(tmp_path, 0, 1), planned(1)
    assert folder.attempt(trial) is None
    start(folder, trial)
    assert folder.attempt(trial) is None, "it is not over"
    run(folder, trial, Outcome.failed, "disk full")
    start(folder, trial)
    attempt = folder.attempt(trial)
    assert attempt is not None
    assert (attempt.outcome, attempt.reason, attempt.done) == ("failed", "disk full", False)
    assert (attempt.metrics["m"], attempt.warnings) == (1.0, ["w"])
    assert attempt.seconds >= 0
    run(folder, trial, Outcome.finished)
    again = folder.attempt(trial)
    assert again is not None
    assert again.done
    assert folder.attempt(planned(0)) is None, "of another trial"


@pytest.mark.parametrize("outcome", Outcome)
def test_what_says_something_about_the_point_is_done(outcome: Outcome) -> None:
    if outcome is not Outcome.refused:  # a refusal has no record
        assert Attempt(outcome.value, "", 0.0, {}, []).done == (outcome in MEASURED)


ATTEMPTS = [
    Attempt("finished", "", 1.0, {}, []),
    Attempt("finished", "", 1.0, {}, []),
    Attempt("out_of_memory", "full", 1.0, {}, []),
    None,
]


@pytest.mark.parametrize("outcome", [Outcome.finished, Outcome.killed])
def test_the_end_counts_the_outcomes_of_the_trials(tmp_path: Path, outcome: Outcome) -> None:
    folder = sweep_in(tmp_path, 0, 1, 2, 3)
    before = folder.read()
    folder.end(outcome, ATTEMPTS)
    record = folder.read().record
    assert (record.outcome, record.tags["outcome"]) == (outcome.value, outcome.value)
    counted = {name: count for name, count in record.metrics.items() if count}
    assert counted == {"sweep/trials": 4.0, "sweep/finished": 2.0, "sweep/out_of_memory": 1.0}
    assert record.ended_ms is not None
    assert record.ended_ms >= record.started_ms
    assert (record.id, folder.read().trials) == (before.record.id, before.trials)


def test_an_outcome_that_no_trial_has_any_more_is_counted_as_none(tmp_path: Path) -> None:
    """A store keeps the last figure that it was told."""
    folder = sweep_in(tmp_path, 0)
    folder.end(Outcome.killed, [Attempt("failed", "", 1.0, {}, [])])
    told = folder.read().record.metrics
    folder.end(Outcome.finished, [Attempt("finished", "", 1.0, {}, [])])
    now = folder.read().record.metrics
    assert told.keys() == now.keys()
    assert (now["sweep/failed"], now["sweep/finished"]) == (0.0, 1.0)


def test_a_sweep_whose_process_is_gone_was_killed_and_that_is_news_once(tmp_path: Path) -> None:
    folder = sweep_in(tmp_path, 0)
    assert folder.read().record.outcome == RUNNING
    assert folder.end_for_dead()
    assert folder.read().record.outcome == "killed"
    assert folder.read().record.tags["outcome"] == "killed"
    assert not folder.end_for_dead()


def test_a_sweep_that_was_over_was_not_killed(tmp_path: Path) -> None:
    folder = sweep_in(tmp_path, 0)
    folder.end(Outcome.finished, ATTEMPTS)
    assert not folder.end_for_dead()
    assert folder.read().record.outcome == "finished"


def deliver(folder: SweepFolder) -> None:
    folder.mark_delivered("r1", folder.read().record)


def test_a_store_that_knows_a_sweep_does_not_know_what_came_after(tmp_path: Path) -> None:
    folder = sweep_in(tmp_path, 0)
    assert not folder.delivered_as_it_is
    deliver(folder)
    assert folder.delivered_as_it_is
    folder.end(Outcome.finished, ATTEMPTS)
    assert not folder.delivered_as_it_is
    deliver(folder)
    assert folder.delivered_as_it_is


def test_a_sweep_that_finished_again_with_more_trials_is_to_be_delivered_again(tmp_path: Path) -> None:
    """Finished and delivered, then taken up while the store was out of reach: its figures are others now."""
    folder = sweep_in(tmp_path, 0)
    folder.end(Outcome.finished, ATTEMPTS[:2])
    deliver(folder)
    folder.end(Outcome.finished, ATTEMPTS)
    assert not folder.delivered_as_it_is


def test_the_plan_and_the_table_go_into_the_store(tmp_path: Path) -> None:
    folder = sweep_in(tmp_path, 0)
    run(folder, planned(0), Outcome.finished)
    assert [path.name for path in folder.artifacts()] == ["sweep.json"]
    with (tmp_path / "trials.csv").open("w") as table:
        csv.writer(table).writerow(["trial"])
    assert [path.name for path in folder.artifacts()] == ["sweep.json", "trials.csv"]


def test_trials_alone_and_of_sweeps_are_what_a_forecast_is_made_from(tmp_path: Path) -> None:
    folder = sweep_in(tmp_path / "day" / "sweep", 0, 1)
    run(folder, planned(0), Outcome.finished)
    run(folder, planned(0), Outcome.failed)
    start(folder, planned(1))
    alone = TrialFolder(tmp_path / "day" / "alone")
    alone.begin(asked_for(planned(7)), TrialConfig(), {}, HostFacts())
    finish(alone, asked_for(planned(7)), End(outcome=Outcome.finished, reason=""), [], [], HostFacts())
    found = [(outline["point"], outline["outcome"]) for outline in outlines(tmp_path)]
    assert sorted(found) == [("p0", "failed"), ("p0", "finished"), ("p7", "finished")]
    assert outlines(tmp_path / "nowhere") == []
