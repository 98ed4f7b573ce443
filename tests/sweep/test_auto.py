"""A sweep with repeats=auto: what it refuses, how it goes on, and that a kill changes nothing."""

import html
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import lab_in

from lora_lab.comparison.judge import Answer
from lora_lab.comparison.rule import RULE_TAG, TOKENS_PER_SECOND, Rule
from lora_lab.config import AUTO, InvalidInput, TrackingConfig, TrialConfig
from lora_lab.outcome import EXIT_INTERRUPTED, End, Outcome
from lora_lab.store.fingerprint import point_digest
from lora_lab.store.process_id import this_process
from lora_lab.store.record import Record
from lora_lab.store.sweep_folder import Plan, Planned, SweepFolder
from lora_lab.store.trial_folder import Manifest, TrialFolder
from lora_lab.sweep.auto import judged, run_blocks
from lora_lab.sweep.contrasts import check_same, check_typed, rule_of
from lora_lab.sweep.plan import GridPoint, plan_trials
from lora_lab.telemetry.figures import Summary
from lora_lab.telemetry.host_facts import HostFacts


def points(*lines: str, contrast: str = "optimizer", margin: str = "1%", **conditions: str) -> list[GridPoint]:
    """Points that were asked for by these lines, with repeats=auto."""
    made = []
    for place, line in enumerate(lines):
        config = TrialConfig(batch_size=place + 1, repeats=AUTO, contrast=contrast, margin=margin)
        overrides = [*line.split(), f"contrast='{contrast}'", "repeats=auto"]
        made.append(
            GridPoint(overrides=overrides, config=config, digest=point_digest(config), conditions=dict(conditions))
        )
    return made


PAIR = ("optimizer=adamw", "optimizer=paged_adamw")
CROSS = tuple(f"{one} precision={two}" for one in PAIR for two in ("fp16", "bf16"))


def test_each_contrast_pairs_the_points_that_are_else_the_same() -> None:
    found = points(*CROSS, contrast="optimizer,precision")
    digests = [point.digest for point in found]
    optimizer, precision = rule_of(found).contrasts
    assert (optimizer.over, optimizer.of) == ("adamw", "paged_adamw")
    assert list(zip(optimizer.over_points, optimizer.of_points, strict=True)) == [
        (digests[0], digests[2]),
        (digests[1], digests[3]),
    ]
    assert list(zip(precision.over_points, precision.of_points, strict=True)) == [
        (digests[0], digests[1]),
        (digests[2], digests[3]),
    ]


def test_levels_of_a_number_are_named_with_their_setting() -> None:
    [contrast] = rule_of(points("batch_size=1", "batch_size=2", contrast="batch_size")).contrasts
    assert (contrast.over, contrast.of) == ("batch_size=1", "batch_size=2")


@pytest.mark.parametrize(
    ("lines", "contrast", "says"),
    [
        (PAIR, "precision", "precision=A,B"),
        (PAIR, "optimiser", "Did you mean optimizer"),
        (PAIR[:1], "optimizer", "optimizer=A,B"),
        ((*PAIR, "optimizer=lion_8bit"), "optimizer", "optimizer=adamw,paged_adamw"),
        (("seed=1", "seed=2"), "seed", "Compare another setting"),
        (("device=gpu:0", "device=gpu:1"), "device", "Compare another setting"),
        (CROSS[:3], "optimizer", "Sweep a grid"),
        (PAIR, "optimizer,optimizer", "twice"),
    ],
)
def test_a_contrast_that_the_sweep_does_not_hold_is_refused(lines: tuple[str, ...], contrast: str, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        rule_of(points(*lines, contrast=contrast))


def test_points_on_two_cards_are_refused() -> None:
    one, _ = points(*PAIR, **{"device.uuid": "GPU-1"})
    _, other = points(*PAIR, **{"device.uuid": "GPU-2"})
    with pytest.raises(InvalidInput, match="one device"):
        rule_of([one, other])


@pytest.mark.parametrize("name", ["contrast", "margin", "budget_minutes", "first_pairs"])
def test_a_rule_with_two_values_is_refused(name: str) -> None:
    """Else one point of each pair of twins would be dropped, and its rule with it."""
    one, other = points("optimizer=adamw", "optimizer=adamw")
    values: dict[str, Any] = {"contrast": "precision", "margin": "2%"}
    other = replace(one, config=replace(one.config, **{name: values.get(name, 7)}))
    with pytest.raises(InvalidInput, match=f"{name}=.*one value"):
        check_typed([one, other])
    check_typed(points(*CROSS))
    check_typed([replace(each, config=replace(each.config, repeats=3)) for each in (one, other)])


@pytest.mark.parametrize(
    ("lines", "contrast", "says"),
    [
        (("optimizer=adamw", "optimizer=adamw"), "optimizer", "the same: adamw"),
        (("learning_rate=1e-4", "learning_rate=0.0001"), "optimizer,learning_rate", "the same: 1e-4, 0.0001"),
    ],
)
def test_two_values_that_are_the_same_are_refused(lines: tuple[str, ...], contrast: str, says: str) -> None:
    one, other = points(*lines, contrast=contrast)
    with pytest.raises(InvalidInput, match=says):
        check_typed([one, replace(other, config=one.config, digest=one.digest)])
    check_typed([one, other])


def test_a_sweep_is_not_continued_by_another_rule_but_with_another_budget() -> None:
    then = rule_of(points(*PAIR))
    longer = Rule(**{name: getattr(then, name) for name in Rule.__slots__} | {"budget_minutes": 24.0})
    check_same(then, longer)
    with pytest.raises(InvalidInput, match="margin=1%"):
        check_same(then, rule_of(points(*PAIR, margin="2%")))
    with pytest.raises(InvalidInput, match=r"contrast=optimizer .*\(adamw, paged_adamw: .* hydra.sweep.dir=FOLDER"):
        check_same(then, rule_of(points(*PAIR[::-1])))


class Sweep:
    """A sweep in a folder, whose trials take a minute each and are as fast as their repeat and point decide."""

    def __init__(
        self,
        path: Path,
        budget_minutes: float = 1000.0,
        outcomes: dict[str, Outcome] | None = None,
        stand_ins: str = "",
        absent: str = "",
    ) -> None:
        self.paged_ran, self.paged_has_no_speed = stand_ins or "none", absent
        self.points = points(*PAIR)
        for each in self.points:
            each.config.budget_minutes = budget_minutes
        self.folder = SweepFolder(path)
        self.outcomes = outcomes or {}
        self.plan_budget()

    def plan_budget(self) -> None:
        """What the sweeper writes before it runs anything."""
        if self.folder.exists:
            plan = self.folder.read()
            plan.rule = rule_of(self.points)
        else:
            plan = Plan(
                owner=this_process(),
                tracking=TrackingConfig(),
                record=Record(name="sweep", params={}),
                conditions={},
                trials=plan_trials(self.points, 1, 0),
                rule=rule_of(self.points),
            )
        self.folder.write(plan)

    def trial(self, trial: Planned) -> None:
        outcome = self.outcomes.get(trial.settings["optimizer"], Outcome.finished)
        effect = 0.02 if trial.settings["optimizer"] == "adamw" else 0.0
        speed = 1000 * math.exp(effect + random.Random(trial.fingerprint).gauss(0, 0.01))
        record = Record(name=trial.name, params={}, started_ms=0, ended_ms=60_000, outcome=outcome.value)
        paged = trial.settings["optimizer"] != "adamw"
        record.tags["stand_ins"] = self.paged_ran if paged else "none"
        folder = TrialFolder(self.folder.path / self.folder.next_attempt(trial))
        asked = Manifest(owner=this_process(), t=0.0, tracking=TrackingConfig(), record=record)
        folder.begin(asked, TrialConfig(), {}, HostFacts())
        metrics = {TOKENS_PER_SECOND: speed} if outcome is Outcome.finished else {}
        summary = Summary(metrics=metrics)
        if paged and self.paged_has_no_speed:
            summary = Summary(absent={TOKENS_PER_SECOND: self.paged_has_no_speed})
        folder.write_end(record, summary, End(outcome=outcome, reason="no room"), HostFacts())

    def run(self, launch: Callable[[list[Planned]], int] | None = None) -> int:
        def all_of(block: list[Planned]) -> int:
            for trial in block:
                self.trial(trial)
            return 0

        return run_blocks(self.folder, self.points, launch or all_of)

    def ran(self) -> list[tuple[int, str]]:
        return [(t.repeat, t.settings["optimizer"]) for t in self.folder.read().trials if self.folder.begun(t)]

    def answer(self) -> tuple[Answer, int]:
        [verdict] = judged(self.folder, self.folder.read()).verdicts
        return verdict.answer, verdict.pairs


def test_blocks_run_until_there_is_an_answer_and_no_longer(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "sweep")
    assert sweep.run() == 0
    answer, pairs = sweep.answer()
    assert answer is Answer.slower
    assert pairs in (5, 8, 12, 18, 27)
    assert sweep.ran() == [(t.repeat, t.settings["optimizer"]) for t in plan_trials(sweep.points, pairs, 0)]
    assert "paged_adamw is slower than adamw" in sweep.folder.read().record.tags["verdict"]
    assert sweep.run(lambda _: pytest.fail("nothing is left to run")) == 0


def test_a_kill_between_blocks_and_a_resume_change_nothing(tmp_path: Path) -> None:
    whole, killed = Sweep(tmp_path / "whole"), Sweep(tmp_path / "killed")
    whole.run()

    def one_block(block: list[Planned]) -> int:
        for trial in block:
            killed.trial(trial)
        return EXIT_INTERRUPTED

    codes = [killed.run(one_block) for _ in range(3)]
    assert codes == [EXIT_INTERRUPTED] * 3
    assert killed.run() == 0
    assert (killed.ran(), killed.answer()) == (whole.ran(), whole.answer())
    assert judged(killed.folder, killed.folder.read()) == judged(whole.folder, whole.folder.read())


def test_a_pair_that_a_kill_cut_off_does_not_count_and_is_not_completed_later(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "sweep")

    def half(block: list[Planned]) -> int:
        sweep.trial(block[0])
        return EXIT_INTERRUPTED

    assert sweep.run(half) == EXIT_INTERRUPTED
    assert sweep.answer() == (Answer.unsettled, 0)
    assert sweep.run() == 0
    ran, (_, pairs) = sweep.ran(), sweep.answer()
    assert [repeat for repeat, _ in ran[:3]] == [0, 1, 1]
    assert len(ran) == 1 + 2 * pairs


def test_no_pair_begins_that_would_end_after_the_budget_and_time_before_a_resume_counts(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "sweep", budget_minutes=7.0)
    assert sweep.run() == 0
    assert (sweep.answer(), len(sweep.ran())) == ((Answer.unsettled, 3), 6), "a fourth pair would end after 8 minutes"
    [line] = judged(sweep.folder, sweep.folder.read()).lines
    assert line.startswith("not settled between paged_adamw and adamw")
    assert "3 pairs in 6 minutes" in line
    sweep = Sweep(sweep.folder.path, budget_minutes=8.5)
    assert sweep.run() == 0
    assert len(sweep.ran()) == 8


def test_a_level_that_always_fails_ends_the_sweep(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "sweep", outcomes={"paged_adamw": Outcome.out_of_memory})
    assert sweep.run() == 0
    assert sweep.answer() == (Answer.incomparable, 0)
    assert len(sweep.ran()) == 4


def test_a_stand_in_ends_the_sweep_after_one_pair_and_two_trials_without_a_speed_after_two(tmp_path: Path) -> None:
    for number, (blocks, why) in enumerate([(1, {"stand_ins": "plain memory"}), (2, {"absent": "no window"})]):
        sweep = Sweep(tmp_path / str(number), **why)
        assert sweep.run() == 0
        assert sweep.answer() == (Answer.incomparable, 0)
        assert len(sweep.ran()) == 2 * blocks
        [line] = judged(sweep.folder, sweep.folder.read()).lines
        assert next(iter(why.values())) in line


def test_a_trial_that_is_refused_ends_the_sweep(tmp_path: Path) -> None:
    """It leaves no record, so its block would be run again for ever."""
    sweep, launched = Sweep(tmp_path / "sweep"), []
    assert sweep.run(lambda block: launched.append(block) or 0) == 1
    assert len(launched) == 1


@pytest.mark.timeout(300)
def test_the_command_line_answers_and_the_report_recomputes_it(tmp_path: Path) -> None:
    lab, report = lab_in(tmp_path), lab_in(tmp_path, "lora_lab.report")
    small = ("model=tiny", "measure=quick", "seq_len=32", "data=random_tokens", "data.rows=16", "method=lora")
    asked = ("-m", *small, "batch_size=1,4", "contrast=batch_size", "repeats=auto", "first_pairs=2", "margin=0.5%")
    said = lab(*asked, "budget_minutes=0.1", OMP_NUM_THREADS="1")
    assert said.code == 0, said.text
    [plan] = tmp_path.glob("multirun/*/*/sweep.json")
    sweep = json.loads(plan.read_text())
    rule = json.loads(sweep["record"]["tags"][RULE_TAG])
    assert rule == sweep["rule"]
    assert (rule["margin_percent"], rule["first_pairs"], rule["budget_minutes"]) == (0.5, 2, 0.1)
    answer = [line for line in said.out.splitlines() if "batch_size=4" in line and "batch_size=1" in line][-1]
    assert " pairs in " in answer or " pair in " in answer
    again = report()
    assert again.code == 0, again.text
    shown = answer.partition(" (")[0].partition(",")[0]
    assert shown in again.out
    [page] = tmp_path.glob("multirun/*/*/report.html")
    assert shown.partition(":")[0] in html.unescape(page.read_text())
    refused = lab(*asked[:-1], "margin=3%", "resume=true", OMP_NUM_THREADS="1")
    assert refused.code == 2
    assert "margin=0.5%" in refused.err
