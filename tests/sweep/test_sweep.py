"""A sweep through the real command line into a real MLflow store. Every trial has a tiny model and takes a second."""

import contextlib
import csv
import itertools
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Lab, Said, lab_in, records_in, save_tiny, started, store_of, with_fakes
from filelock import FileLock
from mlflow.entities import Run

from lora_lab.composition.compose import CONF
from lora_lab.outcome import Outcome

SMALL = ("model=tiny", "measure=quick", "method=lora", "precision=fp32", "seq_len=32")
RANDOM = ("data=random_tokens", "data.rows=16")
FAST = (*SMALL, *RANDOM)
PARENT = "mlflow.parentRunId"
OUTCOMES = {outcome.value for outcome in Outcome}


def quick_lab(folder: Path) -> Lab:
    """The command line, with one thread a trial: several would fight over a small machine's cores."""
    lab = lab_in(folder)
    return lambda *arguments, **environment: lab(*arguments, **{"OMP_NUM_THREADS": "1", **environment})


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """Like conftest's, with one thread a trial."""
    return quick_lab(tmp_path)


@dataclass(frozen=True)
class Look:
    """What a command said, and what there was in its folder when it had ended."""

    said: Said
    parents: list[Run]
    """Oldest first."""
    trials: list[Run]
    times: dict[str, int]
    """When each record on disk was written."""

    def trials_below(self, parent: Run) -> list[Run]:
        return [run for run in self.trials if run.data.tags[PARENT] == parent.info.run_id]


def look(folder: Path, said: Said) -> Look:
    runs = sorted(store_of(folder)[1], key=lambda run: run.info.start_time)
    records = folder.glob("multirun/*/*/*/record.json")
    return Look(
        said=said,
        parents=[run for run in runs if PARENT not in run.data.tags],
        trials=[run for run in runs if PARENT in run.data.tags],
        times={str(path.relative_to(folder)): path.stat().st_mtime_ns for path in records},
    )


def sweeps_in(folder: Path) -> list[Path]:
    return [path.parent for path in sorted(folder.glob("multirun/*/*/sweep.json"))]


def table_of(sweep: Path) -> list[dict[str, str]]:
    with (sweep / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def lines_of_trials(said: Said) -> list[str]:
    return re.findall(r"^\[\d+/\d+\] .+$", said.out, re.MULTILINE)


def rows_of_table(said: Said) -> list[list[str]]:
    """The cells of the table that a person sees at the end: settings, outcome, figures."""
    lines = (line.strip("│").split("│") for line in said.out.splitlines() if line[:1] == "│")
    rows = [[cell.strip() for cell in line] for line in lines]
    return [row for row in rows if OUTCOMES & set(row)]  # not what a wide setting has pushed into a second line


def spans_in(folder: Path) -> list[tuple[float, float]]:
    """From the first to the last word of each worker, in order."""
    spans = []
    for path in folder.glob("multirun/*/*/*/events.jsonl"):
        times = [json.loads(line)["t"] for line in path.read_text().splitlines()]
        spans.append((min(times), max(times)))
    return sorted(spans)


def overlaps(spans: list[tuple[float, float]]) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    return [(one, other) for one, other in itertools.pairwise(spans) if other[0] < one[1]]


def runs_of(folder: Path) -> list[Run]:
    """As conftest's store_of, which would make a store where there is none."""
    return store_of(folder)[1] if (folder / "mlruns" / "mlflow.db").is_file() else []


def assert_nothing_ran(folder: Path) -> None:
    assert not list(folder.glob("multirun/**/events.jsonl")), "no trial was begun"
    assert runs_of(folder) == [], "no run is left behind"


@dataclass(frozen=True)
class Story:
    """One command after the other in one folder."""

    folder: Path
    first: Look
    again: Look
    bigger: Look
    new_sweep: Look
    beside: Look


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("my own sweeps")
    lab = quick_lab(folder)
    once = ("-m", *FAST, "seed=5")
    twice = (*once, "repeats=2")
    return Story(
        folder=folder,
        first=look(folder, lab(*twice, "batch_size=1,2")),
        again=look(folder, lab(*twice, "batch_size=1,2", "resume=true")),
        bigger=look(folder, lab(*twice, "batch_size=1,2,4", "resume=true")),
        new_sweep=look(folder, lab(*once, "batch_size=1,2")),
        beside=look(folder, lab(*once, "batch_size=2,8", "resume=true")),
    )


def test_every_trial_is_nested_below_one_parent_and_all_are_finished(story: Story) -> None:
    first = story.first
    assert first.said.code == 0, first.said.text
    [parent] = first.parents
    assert len(first.trials_below(parent)) == len(first.trials) == 4
    assert {run.info.status for run in (parent, *first.trials)} == {"FINISHED"}
    assert Counter(run.data.params["batch_size"] for run in first.trials) == {"1": 2, "2": 2}
    assert len({run.data.tags["process.pid"] for run in (parent, *first.trials)}) == 1


def test_the_parent_says_what_was_varied_and_how_it_ended(story: Story) -> None:
    [parent] = story.first.parents
    params, metrics, tags = parent.data.params, parent.data.metrics, parent.data.tags
    axes = {name: value for name, value in params.items() if name.startswith("axis.")}
    assert axes == {"axis.batch_size": "1,2"}
    assert (metrics["sweep/trials"], metrics["sweep/finished"], tags["outcome"]) == (4, 4, "finished")
    client, _ = store_of(story.folder)
    assert {"sweep.json", "trials.csv"} <= {item.path for item in client.list_artifacts(parent.info.run_id)}


def test_every_point_is_run_once_before_any_is_run_twice(story: Story) -> None:
    ran = sorted(story.first.trials, key=lambda run: run.info.start_time)
    assert [int(run.data.tags["trial"]) for run in ran] == list(range(4)), "in the order of their numbers"
    assert [run.data.params["repeat"] for run in ran] == ["0"] * 2 + ["1"] * 2
    for block in (ran[:2], ran[2:]):
        assert len({run.data.tags["point"] for run in block}) == 2


def test_each_repeat_has_a_seed_of_its_own(story: Story) -> None:
    seeds = Counter((run.data.params["repeat"], run.data.params["seed"]) for run in story.first.trials)
    assert seeds == {("0", "5"): 2, ("1", "6"): 2}
    losses = {run.data.metrics["loss/train"] for run in story.first.trials}
    assert len(losses) == 4, "no two trials are the same"


def test_a_person_sees_a_forecast_then_a_line_a_trial_then_a_table(story: Story) -> None:
    said = story.first.said
    lines = said.out.splitlines()
    assert "4 trials: 2 points x 2 repeats" in lines[0]
    assert "unknown" in lines[1]
    trials = lines_of_trials(said)
    assert [line.partition(":")[0] for line in trials] == [f"[{number}/4] finished" for number in range(1, 5)]
    assert all("tokens/s" in line and "held-out loss" in line for line in trials)
    rows = rows_of_table(said)
    assert len(rows) == len({tuple(row) for row in rows}) == 4
    assert all("finished" in row for row in rows)
    assert lines.index(trials[-1]) < next(number for number, line in enumerate(lines) if line[:1] == "│")
    assert "mlflow ui" in said.out


def test_the_table_is_there_for_other_programs_too(story: Story) -> None:
    rows = table_of(sweeps_in(story.folder)[0])
    assert len({(row["trial"], row["repeat"]) for row in rows}) == len(rows) == 6, "those of the bigger grid too"
    assert {row["outcome"] for row in rows} == {"finished"}
    in_store = {run.data.metrics["throughput/tokens_per_second"] for run in story.bigger.trials}
    assert {float(row["throughput/tokens_per_second"]) for row in rows} == in_store


def test_resume_of_a_finished_sweep_runs_nothing_and_exits_as_before(story: Story) -> None:
    again, first = story.again, story.first
    assert again.said.code == first.said.code == 0, again.said.text
    assert again.times == first.times
    assert {run.info.run_id for run in again.trials} == {run.info.run_id for run in first.trials}
    assert [run.info.run_id for run in again.parents] == [run.info.run_id for run in first.parents]
    assert again.parents[0].info.status == "FINISHED"
    assert lines_of_trials(again.said) == []
    assert len(rows_of_table(again.said)) == 4, "the figures are shown all the same"


def test_resume_of_a_bigger_grid_runs_what_is_new_below_the_same_parent(story: Story) -> None:
    bigger, first = story.bigger, story.first
    assert bigger.said.code == 0, bigger.said.text
    assert "6 trials" in bigger.said.out
    assert "4 of them done already" in bigger.said.out
    assert len(lines_of_trials(bigger.said)) == 2
    assert first.times.items() <= bigger.times.items(), "what was done is not touched"
    assert {Path(path).parent.parent for path in bigger.times} == {Path(path).parent.parent for path in first.times}
    [parent] = bigger.parents
    assert parent.info.run_id == first.parents[0].info.run_id
    known = {run.info.run_id for run in first.trials}
    new = [run for run in bigger.trials_below(parent) if run.info.run_id not in known]
    shapes = Counter((run.data.params["batch_size"], run.data.params["repeat"]) for run in new)
    assert shapes == {("4", "0"): 1, ("4", "1"): 1}
    assert (parent.info.status, parent.data.metrics["sweep/trials"]) == ("FINISHED", 6)
    assert len(rows_of_table(bigger.said)) == 6


def test_resume_does_not_change_where_a_sweep_says_its_files_are(story: Story) -> None:
    folders = [each.parents[0].data.tags["folder"] for each in (story.first, story.bigger)]
    assert folders == [str(sweeps_in(story.folder)[0])] * 2


def test_without_resume_it_is_a_new_sweep(story: Story) -> None:
    new_sweep = story.new_sweep
    assert new_sweep.said.code == 0, new_sweep.said.text
    old, new = new_sweep.parents
    assert old.info.run_id == story.first.parents[0].info.run_id
    assert (len(new_sweep.trials_below(old)), len(new_sweep.trials_below(new))) == (6, 2)
    assert len(sweeps_in(story.folder)) == 2


def test_the_forecast_knows_points_that_have_run_here_before(story: Story) -> None:
    [said] = [line for line in story.new_sweep.said.out.splitlines() if line.startswith("time:")]
    assert re.search(r"about [\d.]+ (s|min)\b", said), said
    [half] = [line for line in story.bigger.said.out.splitlines() if line.startswith("time:")]
    assert "unknown" in half, "nothing tells how long the new points take"


def test_a_sweeps_table_keeps_what_earlier_commands_asked_for(story: Story) -> None:
    """The sweep of batch_size=1,2 is gone on with as batch_size=2,8."""
    beside = story.beside
    assert beside.said.code == 0, beside.said.text
    assert len(lines_of_trials(beside.said)) == 1
    parent = beside.parents[-1]
    assert {run.data.params["batch_size"] for run in beside.trials_below(parent)} == {"1", "2", "8"}
    assert len(table_of(sweeps_in(story.folder)[-1])) == 3
    assert parent.data.metrics["sweep/trials"] == 3


def test_a_sweep_that_another_process_runs_is_not_taken_up(story: Story) -> None:
    newest = sweeps_in(story.folder)[-1]
    with FileLock(newest / ".sweep.lock"):
        said = quick_lab(story.folder)("-m", *FAST, "seed=5", "batch_size=1,2", "resume=true")
    assert said.code == 2, said.text
    assert "runs a sweep in" in said.err
    assert str(newest.name) in said.err


def write_rows(path: Path, plus: int) -> None:
    rows = [{"instruction": f"What is {n} + {plus}?", "output": str(n + plus)} for n in range(16)]
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.nightly
def test_resume_measures_again_what_was_measured_on_other_rows(lab: Lab, tmp_path: Path) -> None:
    command = ("-m", *SMALL, "data=jsonl", "data.path=rows.jsonl", "seq_len=64", "batch_size=1,2", "resume=true")
    write_rows(tmp_path / "rows.jsonl", plus=1)
    first = look(tmp_path, lab(*command))
    assert first.said.code == 0, first.said.text
    assert "starting a new one" in first.said.out

    write_rows(tmp_path / "rows.jsonl", plus=2)
    other = look(tmp_path, lab(*command))
    assert other.said.code == 0, other.said.text
    assert len(lines_of_trials(other.said)) == 2
    old, new = sweeps_in(tmp_path)
    [told] = [line for line in other.said.out.splitlines() if "other conditions" in line]
    assert re.match(rf"2 trials in \S*{old.name} ran under other conditions: data \w+ -> \w+$", told)
    assert [len(other.trials_below(parent)) for parent in other.parents] == [2, 2]
    assert first.times.items() <= other.times.items()

    write_rows(tmp_path / "rows.jsonl", plus=1)
    back = look(tmp_path, lab(*command))
    assert lines_of_trials(back.said) == [], "rows count by what they say, not by when they were written"
    assert (back.times, old.name in back.said.out, new.name in back.said.out) == (other.times, True, False)


def test_all_faults_of_all_points_are_told_before_anything_is_run(lab: Lab, tmp_path: Path) -> None:
    said = lab("-m", *FAST, "batch_size=1,0", "seq_len=32,5000", "optimizer=adamw,typo")
    assert said.code == 2, said.text
    for words in ("batch_size=0", "beyond the model's 4096 positions", "optimizer/typo", "paged_adamw"):
        assert words in said.err
    assert "Traceback" not in said.text
    assert_nothing_ran(tmp_path)


def test_what_only_a_worker_can_see_refuses_the_whole_sweep_too(lab: Lab, tmp_path: Path) -> None:
    save_tiny(tmp_path / "mine")
    points = ("method.target_modules=[all-linear],[nonsense]", "seq_len=32,5000")
    said = lab("-m", *FAST, "model=local", "model.path=mine", *points)
    assert said.code == 2, said.text
    for words in ("nonsense", "beyond the model's 4096 positions"):
        assert words in said.err
    assert_nothing_ran(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sweep=typo",), sorted(path.stem for path in (CONF / "sweep").glob("*.yaml"))),
        (("repeats=2",), ["-m", "sweep="]),
        (("resume=true",), ["-m", "sweep="]),
        (("-m", "repeats=0"), ["repeats=0"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_it_is_refused_in_words_that_tell_what_to_type(
    lab: Lab, tmp_path: Path, arguments: tuple[str, ...], words: list[str]
) -> None:
    flags = [argument for argument in arguments if argument == "-m"]
    said = lab(*flags, *FAST, *(argument for argument in arguments if argument != "-m"))
    assert said.code == 2, said.text
    assert all(word in said.err for word in words), said.err
    assert_nothing_ran(tmp_path)


def test_two_presets_at_once_are_refused_rather_than_run_without_their_points(lab: Lab, tmp_path: Path) -> None:
    said = lab("-m", *FAST, "sweep=paper,rank_lr", "repeats=1", "tracking=none")
    assert said.code == 2, said.text
    assert "sweep=" in said.err
    assert_nothing_ran(tmp_path)


def test_a_refusal_takes_nothing_away_from_a_folder_of_yours(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "notes.txt").write_text("mine")
    said = lab("-m", *FAST, "hydra.sweep.dir=results", "method.target_modules=[nonsense]")
    assert said.code == 2, said.text
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["notes.txt"]


@pytest.mark.nightly
def test_a_point_that_is_named_twice_is_run_once(lab: Lab, tmp_path: Path) -> None:
    said = lab("-m", *FAST, "batch_size=1,1", "learning_rate=1e-3,0.001", "tracking=none")
    assert said.code == 0, said.text
    assert len(records_in(tmp_path)) == 1


MINE = {
    "hydra": {
        "mode": "MULTIRUN",
        "sweeper": {
            "points": [
                "batch_size=1 seq_len=48",
                "batch_size=1 seq_len=48 gradient_checkpointing=full",
                "batch_size=2 seq_len=48 optimizer=adamw method.rank=2",
            ],
            "params": {"method.rank": "4,8"},
            "assumptions": ["the batch is said nowhere", "nor is [the] rank"],
        },
    }
}


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Look:
    folder = tmp_path_factory.mktemp("preset")
    (folder / "own" / "sweep").mkdir(parents=True)
    (folder / "own" / "sweep" / "mine.yaml").write_text("# @package _global_\n" + yaml.safe_dump(MINE))
    beaten = ("seq_len=32", "optimizer=lion_8bit")  # FAST says seq_len too
    return look(folder, quick_lab(folder)("--config-dir", "own", "sweep=mine", *FAST, *beaten))


@pytest.mark.nightly
def test_your_own_preset_is_one_more_sweep(preset: Look) -> None:
    assert preset.said.code == 0, preset.said.text
    points = Counter(
        (run.data.params["batch_size"], run.data.params["gradient_checkpointing"], run.data.params["method.rank"])
        for run in preset.trials
    )
    grid = [(*point, rank) for point in (("1", "none"), ("1", "full")) for rank in ("4", "8")]
    assert points == dict.fromkeys([*grid, ("2", "none", "2")], 1), "a point's own value beats the grid's"
    [parent] = preset.parents
    assert (parent.data.params["sweep"], parent.info.status) == ("mine", "FINISHED")


@pytest.mark.nightly
def test_the_command_line_beats_a_presets_points(preset: Look) -> None:
    assert {(run.data.params["seq_len"], run.data.params["optimizer"]) for run in preset.trials} == {
        ("32", "lion_8bit")
    }


@pytest.mark.nightly
def test_a_presets_assumptions_are_shown_and_kept(preset: Look) -> None:
    [parent] = preset.parents
    for assumption in MINE["hydra"]["sweeper"]["assumptions"]:  # type: ignore[index]
        assert f"assumed: {assumption}" in preset.said.out.splitlines()
        assert assumption in parent.data.tags["assumptions"]


@pytest.mark.nightly
def test_points_that_differ_have_names_that_differ(preset: Look) -> None:
    """Two of the preset's points differ in a setting that only one of them says."""
    assert len({run.info.run_name for run in preset.trials}) == 5
    settings = [tuple(row[: row.index("finished")]) for row in rows_of_table(preset.said)]
    assert len(set(settings)) == 5, "the table's rows are told apart"


def test_the_papers_runs_go_through_on_any_machine(lab: Lab, tmp_path: Path) -> None:
    short = ("measure.warmup_steps=0", "measure.steps=1", "measure.eval_rows=0", "repeats=1", "tracking=none")
    said = lab("sweep=paper", "model=tiny", *RANDOM, "seq_len=32", *short)
    assert said.code == 0, said.text
    records = records_in(tmp_path)
    keys = ("optimizer", "precision", "batch_size", "method.raise_to_fp32", "gradient_checkpointing")
    assert {tuple(record["params"][key] for key in keys) for record in records} == {
        ("adamw", "fp16", "1", "True", "full"),
        ("paged_adamw", "fp16", "2", "True", "full"),
        ("paged_adamw", "bf16", "2", "True", "full"),
    }
    assert {record["outcome"] for record in records} == {"finished"}


def test_what_this_machine_cannot_do_is_that_points_outcome(lab: Lab, tmp_path: Path) -> None:
    said = lab("-m", *FAST, "device=cpu", "vram_limit_gib=8,null")
    assert said.code == 0, said.text
    outcomes = {run.data.params["vram_limit_gib"]: run.data.tags["outcome"] for run in look(tmp_path, said).trials}
    assert outcomes == {"8.0": "unsupported", "None": "finished"}
    [reason] = [record["tags"]["reason"] for record in records_in(tmp_path) if record["outcome"] == "unsupported"]
    assert "limits an NVIDIA card" in reason
    assert f"{reason}" in said.out


def test_a_sweep_of_which_nothing_could_finish_says_so_by_its_exit_code(lab: Lab, tmp_path: Path) -> None:
    said = lab("-m", *FAST, "device=cpu", "capacity=8gib,6gib", "tracking=none")
    assert said.code == 3, said.text
    assert [record["outcome"] for record in records_in(tmp_path)] == ["unsupported"] * 2


JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
"""Each of its two processes imports everything, and so does the server of each one's workers: 20 s of a core."""


@pytest.mark.nightly
@pytest.mark.parametrize("launcher", [(), JOBLIB], ids=["alone", "joblib"])
def test_what_is_started_at_once_queues_for_the_device_and_loses_nothing(
    tmp_path: Path, launcher: tuple[str, ...]
) -> None:
    """Two sweeps in an empty folder, one of them with two trials at a time."""
    sizes = {("1", "2", "4"): launcher, ("3", "5"): ()}
    commands = [("-m", *more, *FAST, f"batch_size={','.join(some)}") for some, more in sizes.items()]
    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(started(tmp_path, *command)) for command in commands]
        said = [process.communicate()[0] for process in both]
    assert [process.wait() for process in both] == [0, 0], said
    seen = look(tmp_path, Said(0, said[0], said[1]))
    nested = {tuple(sorted(run.data.params["batch_size"] for run in seen.trials_below(p))) for p in seen.parents}
    assert nested == set(sizes)
    assert {run.info.status for run in (*seen.parents, *seen.trials)} == {"FINISHED"}
    assert len(seen.times) == len(list(tmp_path.glob("multirun/*/*/*/delivered.json"))) == 5
    assert "waiting for the CPU, on which process" in seen.said.text
    spans = spans_in(tmp_path)
    assert (len(spans), overlaps(spans)) == (5, [])


# --- the idle draw of a card

AT_REST = {"1": "measure.idle_seconds=1.5", "2": "measure.idle_seconds=1.5", "3": "share_device=true", "4": ""}
"""Batch size and what else tells a point from the others; by default nothing is measured."""


@dataclass(frozen=True)
class Rested:
    """What a trial of a sweep knows of its card's idle draw."""

    point: str
    repeat: int
    seen: dict[str, Any]
    readings: str
    """That the draw is made of; empty where there are none."""


@pytest.fixture(scope="module")
def at_rest(tmp_path_factory: pytest.TempPathFactory) -> list[Rested]:
    """A sweep on a card that is none: torch finds no GPU there, so its trials fail, but not before they have found
    out about the idle draw. In order of running."""
    folder = tmp_path_factory.mktemp("at rest")
    points = [f"batch_size={batch_size} {more or 'measure.idle_seconds=0'}" for batch_size, more in AT_REST.items()]
    preset = {"hydra": {"mode": "MULTIRUN", "sweeper": {"points": points}}}
    (folder / "own" / "sweep").mkdir(parents=True)
    (folder / "own" / "sweep" / "resting.yaml").write_text("# @package _global_\n" + yaml.safe_dump(preset))
    said = quick_lab(folder)(
        *("--config-dir", "own", "sweep=resting", *FAST, "repeats=2", "tracking=none"),
        PYTHONPATH=with_fakes(),
        CUDA_VISIBLE_DEVICES="0",
    )
    assert said.code == 1, said.text
    assert said.err.count("measuring the idle power of Fake Card 0 (1.5 s)") == 2, said.err
    [sweep] = sweeps_in(folder)
    found = []
    for trial in json.loads((sweep / "sweep.json").read_text())["trials"]:
        own = sweep / f"{trial['number']:04d}"
        seen, idle = json.loads((own / "seen.json").read_text()), own / "idle.jsonl"
        readings = idle.read_text() if idle.is_file() else ""
        found.append(Rested(trial["settings"]["batch_size"], trial["repeat"], seen, readings))
    assert len(found) == 8
    return found


@pytest.mark.nightly
def test_the_idle_draw_is_measured_once_in_each_block(at_rest: list[Rested]) -> None:
    blocks = [[r for r in at_rest if r.repeat == block and r.point in ("1", "2")] for block in (0, 1)]
    for one, other in blocks:
        assert one.seen["idle"] == other.seen["idle"]
        assert len(one.readings.splitlines()) > 20
        assert one.readings == other.readings, "each trial's record is whole by itself"
        idle = one.seen["idle"]
        assert abs(idle["watts"] - 100.0) <= idle["error_watts"], "the fake card draws 100 W"
        assert idle["source"] == "counter"
    assert blocks[0][0].seen["idle"]["end"] < blocks[1][0].seen["idle"]["start"]


@pytest.mark.nightly
def test_a_shared_card_has_no_idle_draw_and_one_that_nobody_asked_for_is_not_taken_from_others(
    at_rest: list[Rested],
) -> None:
    why = {(r.point, r.repeat): r.seen["no_idle"] for r in at_rest if r.seen["idle"] is None and not r.readings}
    assert why == {(p, repeat): reason for p, reason in WHY_NOT.items() for repeat in (0, 1)}


WHY_NOT = {"3": "share_device=true", "4": "measure.idle_seconds=0"}
