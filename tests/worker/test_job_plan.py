"""How many steps a job takes, and what is due when."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.config import InvalidInput, TrainConfig, TrialConfig
from lora_lab.worker.job_plan import JobPlan, plan_job


def plan(rows: int, batch_size: int = 1, grad_accum_steps: int = 1, **train: float) -> JobPlan:
    settings = TrainConfig(**{"warmup": 0, **train})  # type: ignore[arg-type]
    return plan_job(TrialConfig(batch_size=batch_size, grad_accum_steps=grad_accum_steps, train=settings), rows)


@pytest.mark.parametrize(
    ("rows", "batch_size", "accumulated", "train", "steps", "per_epoch", "left_out"),
    [
        (54, 2, 1, {"epochs": 2.0}, 54, 27, 0),
        (55, 2, 1, {"epochs": 2.0}, 54, 27, 1),
        (55, 2, 4, {"epochs": 1.0}, 7, 7, 1),  # 27 micro-batches: 6 steps of 4 and one of 3
        (55, 2, 1, {"epochs": 0.5}, 14, 27, 1),
        (54, 2, 1, {"max_steps": 7}, 7, 27, 0),
        (50, 1, 1, {"epochs": 1.1}, 55, 50, 0),  # 1.1 x 50 is a little more than 55 in floating point
    ],
)
def test_a_job_is_as_long_as_its_rows_make_it(
    rows: int, batch_size: int, accumulated: int, train: dict[str, float], steps: int, per_epoch: int, left_out: int
) -> None:
    made = plan(rows, batch_size, accumulated, **train)
    assert (made.steps, made.steps_per_epoch, made.rows_left_out) == (steps, per_epoch, left_out)


@given(per_epoch=st.integers(2, 500), parts=st.integers(1, 20), epochs=st.integers(1, 4))
def test_a_part_of_an_epoch_comes_that_often_and_at_each_epochs_end(per_epoch: int, parts: int, epochs: int) -> None:
    parts = min(parts, per_epoch)
    made = plan(per_epoch, epochs=float(epochs), eval_every=1 / parts, checkpoint_every=1.0)
    due = [step for step in range(1, made.steps + 1) if made.evaluates_after(step)]
    assert len(due) == parts * epochs
    assert {per_epoch * epoch for epoch in range(1, epochs + 1)} <= set(due)
    gaps = {after - before for before, after in zip([0, *due], due, strict=False)}
    assert gaps <= {math.floor(per_epoch / parts), math.ceil(per_epoch / parts)}
    assert [step for step in range(1, made.steps + 1) if made.saves_after(step)] == list(
        range(per_epoch, made.steps + 1, per_epoch)
    )


def test_an_epoch_of_one_step_has_no_parts() -> None:
    made = plan(1, epochs=3.0)
    assert [step for step in range(1, 4) if made.evaluates_after(step)] == [1, 2, 3]


def test_above_1_are_steps() -> None:
    made = plan(100, epochs=1.0, eval_every=30.0, checkpoint_every=2.0)
    assert [step for step in range(1, 101) if made.evaluates_after(step)] == [30, 60, 90]


@pytest.mark.parametrize(
    ("train", "names"),
    [
        ({"epochs": 1.0, "warmup": 27}, "train.warmup=27"),
        ({"epochs": 1.0, "eval_every": 0.03}, "train.eval_every=1"),
        ({"epochs": 1.0, "checkpoint_every": 0.03}, "train.checkpoint_every=1"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_type(train: dict[str, float], names: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        plan(27, **train)
    assert len(refused.value.faults) == 1
    assert names in refused.value.faults[0]


def test_what_just_fits_is_taken() -> None:
    assert plan(27, epochs=1.0, warmup=26).warmup_steps == 26
    assert plan(27, epochs=1.0, eval_every=1 / 27).evaluates_after(1)


def test_a_warm_up_by_part_is_rounded_up_but_not_for_arithmetic_and_fits_into_any_job() -> None:
    assert plan(100, max_steps=100, warmup=0.07).warmup_steps == 7
    assert plan(100, max_steps=100, warmup=0.071).warmup_steps == 8
    assert plan(100, max_steps=1, warmup=0.03).warmup_steps == 0
