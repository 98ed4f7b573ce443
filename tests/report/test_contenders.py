"""The contenders of a sweep by halving: the losses at their best values, and what they were for equal cost."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import trial
from rich.console import Console

from lora_lab.comparison.halving import CONTENDER, NOT_STOPPED, RUNG, STOPPED, VALUE
from lora_lab.report.answers.contenders import CURVE, Contenders, between, compared_trials, contenders
from lora_lab.report.findings import Question, find
from lora_lab.report.writing.contenders import cells, heads, notes, stopped_lines
from lora_lab.report.writing.page.page import page
from lora_lab.report.writing.terminal import show
from lora_lab.store.trials import Trial

STEPS = 8


def tried(
    name: str, rate: str, rung: str, loss: float, repeat: int = 0, stopped: str = "", **more: Any
) -> tuple[Trial, list[tuple[int, int, float]]]:
    """A job and its curve: a straight line from 4.0 before the first step to `loss`."""
    tags = {CONTENDER: name, VALUE: f"learning_rate={rate}", RUNG: rung} | ({STOPPED: stopped} if stopped else {})
    metrics = {"loss/eval": loss, "loss/eval_before": 4.0, "job/hours": 1.0, "job/kwh": 2.0, "job/tokens": 800.0}
    metrics |= more.get("metrics", {})
    settings = {"train__max_steps": str(STEPS), "train__schedule": "constant", "method": name, "learning_rate": rate}
    made = trial(metrics, tags=tags, repeat=repeat, **(settings | more.get("settings", {})))
    return made, [(0, step, 4.0 + (loss - 4.0) * step / STEPS) for step in (2, 4, 6, 8)]


def answer(made: Sequence[tuple[Trial, list[tuple[int, int, float]]]]) -> Contenders:
    curves = {each.run_id: {CURVE: curve} for each, curve in made}
    [found] = contenders([each for each, _ in made], curves)
    return found


def two(**of_full: Any) -> list[tuple[Trial, list[tuple[int, int, float]]]]:
    """LoRA with three repeats around 2.0, and full training with three around 1.0 at twice the energy."""
    dear = {"metrics": {"job/hours": 1.0, "job/kwh": 4.0, "vram/peak_device_gib": 9.0}} | of_full
    why = "its held-out loss 3.0000 was behind 2.9000 of learning_rate=2e-4"
    return [
        tried("lora", "1e-4", "1 of 2", 3.0, stopped=why),
        tried("lora", "2e-4", "1 of 2", 2.9, stopped=NOT_STOPPED),
        tried("full", "1e-5", "1 of 2", 2.9, stopped=NOT_STOPPED),
        *(tried("lora", "2e-4", "2 of 2", 2.0 + off, repeat) for repeat, off in enumerate((-0.1, 0.0, 0.1))),
        *(tried("full", "1e-5", "2 of 2", 1.0 + off, repeat, **dear) for repeat, off in enumerate((-0.1, 0.0, 0.1))),
    ]


def test_each_contender_is_seen_at_its_best_value_with_an_interval_over_repeats() -> None:
    found = answer(two())
    full, lora = found.contenders
    assert (full.name, full.value, full.repeats) == ("full", "learning_rate=1e-5", 3)
    assert (lora.value, lora.edge, full.edge) == ("learning_rate=2e-4", "highest", "")
    assert full.loss is not None
    assert full.loss.value == pytest.approx(1.0)
    reach = 4.302653 * 0.1 / math.sqrt(3)  # Student's, two degrees of freedom
    assert full.loss.high == pytest.approx(1.0 + reach, rel=1e-4)
    assert lora.over_lowest is not None
    assert lora.over_lowest.value == pytest.approx(1.0)
    assert lora.over_lowest.high == pytest.approx(1.0), "paired by repeat: what both seeds share falls out"
    assert full.costs == {"hours": 1.0, "kwh": 4.0, "vram": 9.0}
    assert [(each.value, each.rung) for each in lora.stopped] == [("learning_rate=1e-4", "1 of 2")]


def test_for_equal_energy_the_dear_one_is_read_off_its_own_curve_where_the_cheap_one_ended() -> None:
    full, lora = answer(two()).contenders
    assert lora.for_equal["kwh"].value == pytest.approx(2.0), "the cheapest has used all of it at its end"
    assert full.for_equal["kwh"].value == pytest.approx(2.5), "half of its steps: half of the way from 4.0 to 1.0"
    assert full.for_equal["hours"].value == pytest.approx(1.0), "both took as long"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"settings": {"train__schedule": "cosine"}}, "train.schedule=cosine"),
        ({"settings": {"model__weights": "random"}}, "random weights"),
        ({"metrics": {"job/hours": 1.0, "job/kwh": math.nan}}, "energy"),
    ],
    ids=["schedule", "random weights", "no energy"],
)
def test_a_loss_that_says_nothing_is_absent_with_the_reason(more: dict[str, Any], says: str) -> None:
    found = answer(two(**more))
    assert "kwh" in found.why_not_equal
    assert says in found.why_not_equal["kwh"]
    assert all("kwh" not in each.for_equal for each in found.contenders)
    assert any(says in note or "equal energy" in note for note in notes(found))


def test_other_tokens_are_said_and_a_contender_without_a_last_rung_is_named() -> None:
    made = [
        *two(metrics={"job/tokens": 900.0}),
        tried("dora", "1e-4", "1 of 2", 2.0, stopped="its held-out loss is nan"),
    ]
    found = answer(made)
    assert found.uneven_tokens == (800.0, 900.0)
    said = " ".join(notes(found))
    assert "Not at equal tokens: contenders trained on 800 to 900." in said
    assert "dora: no learning_rate came into the last rung." in said
    assert any(line.startswith("dora learning_rate=1e-4 stopped after rung 1 of 2") for line in stopped_lines(found))
    assert all(len(row) == len(heads(found)) for row in cells(found))


def test_the_report_compares_the_last_rung_alone_and_shows_the_table() -> None:
    made = two()
    trials = [each for each, _ in made]
    assert len(compared_trials(trials)) == 6
    assert compared_trials(trials[:3]) == trials[:3], "before the last rung there is nothing else to compare"
    findings = find(trials, [], Question(), "1", {each.run_id: {CURVE: curve} for each, curve in made})
    assert [len(group.group.measured) for group in findings.groups] == [6]
    console = Console(width=160, record=True)
    show(findings, console)
    text = console.export_text()
    assert "each at its best learning_rate" in text
    assert "for equal energy" in text
    assert "what stopped early" in page(findings, {}).lower()


@given(st.lists(st.floats(0, 9), min_size=1, max_size=9), st.floats(0, 20))
def test_a_loss_between_two_evaluations_lies_between_theirs(losses: list[float], step: float) -> None:
    curve = [(2.0 * place, loss) for place, loss in enumerate(losses)]
    found = between(curve, step)
    around = sorted(curve, key=lambda point: abs(point[0] - step))[:2]
    assert min(loss for _, loss in around) - 1e-9 <= found <= max(loss for _, loss in around) + 1e-9
    for place, loss in curve:
        assert between(curve, place) == pytest.approx(loss)
