"""Losses on their way out, and the watch over them."""

import json
import math
import random
import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.events import Step
from lora_lab.outcome import Diverged
from lora_lab.worker.async_losses import DivergenceWatch, LossRelay
from lora_lab.worker.data import TokenCounts

SPIKE = 2.0


def watched(losses: list[float], spike: float = SPIKE) -> tuple[int, str] | None:
    """The step at which the watch spoke, and what it said."""
    watch = DivergenceWatch(spike)
    for step, loss in enumerate(losses, 1):
        try:
            watch.see(step, loss)
        except Diverged as diverged:
            return step, str(diverged)
    return None


def began(told: tuple[int, str] | None) -> int:
    assert told is not None, "nothing was found"
    match = re.search(r"began at step (\d+)", told[1])
    assert match, told[1]
    return int(match[1])


def noisy(level: float, steps: int, seed: int, spread: float = 0.9) -> list[float]:
    noise = random.Random(seed)
    return [level + noise.uniform(-spread, spread) for _ in range(steps)]


SEEDS = st.integers(0, 10**6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@given(before=st.integers(0, 30), seed=SEEDS)
def test_a_loss_that_is_no_number_is_told_at_its_step(bad: float, before: int, seed: int) -> None:
    told = watched([*noisy(3, before, seed), bad, 3.0])
    assert told is not None
    step, said = told
    assert step == before + 1
    assert f"step {before + 1}" in said
    assert str(bad) in said


@given(level=st.floats(1, 12), steps=st.integers(1, 120), seed=SEEDS)
def test_a_steady_noisy_loss_is_left_alone(level: float, steps: int, seed: int) -> None:
    assert watched(noisy(level, steps, seed)) is None


@given(seed=SEEDS, at=st.sets(st.integers(0, 11), max_size=12), high=st.floats(5, 100))
def test_single_hard_batches_are_no_divergence(seed: int, at: set[int], high: float) -> None:
    losses = noisy(3, 72, seed)
    for place in at:
        losses[6 * place + 4] += high
    assert watched(losses) is None


@given(seed=SEEDS)
def test_an_easy_first_batch_sets_no_level(seed: int) -> None:
    assert watched([0.01, *noisy(4, 60, seed)]) is None


@given(seed=SEEDS)
def test_a_falling_loss_may_come_back_up_to_where_it_began(seed: int) -> None:
    losses = noisy(8, 10, seed) + noisy(1, 20, seed) + noisy(8, 20, seed)
    assert watched(losses) is None


@given(level=st.floats(0.5, 10), before=st.integers(5, 60), rise=st.floats(2.0, 50), seed=SEEDS)
def test_a_jump_is_found_soon_and_dated_to_its_step(level: float, before: int, rise: float, seed: int) -> None:
    told = watched(noisy(level, before, seed) + noisy(level + 1.8 + rise, 20, seed + 1))
    assert began(told) == before + 1
    assert told is not None
    assert told[0] <= max(10, before + 5)


@given(before=st.integers(5, 60), slope=st.floats(0.05, 1), seed=SEEDS)
def test_a_slow_rise_is_found_once_it_is_too_high(before: int, slope: float, seed: int) -> None:
    losses = noisy(3, before, seed, 0.2) + [3 + slope * n for n in range(1, 200)]
    told = watched(losses)
    start = began(told)
    assert told is not None
    assert losses[start - 1] > 3 + SPIKE - 0.2
    assert losses[told[0] - 1] < 3 + SPIKE + 0.2 + 10 * slope
    assert start <= told[0]


@given(gap=st.integers(6, 40), seed=SEEDS)
def test_an_early_outlier_that_was_gone_again_is_not_where_it_began(gap: int, seed: int) -> None:
    losses = [*noisy(3, 8, seed), 30.0, *noisy(3, gap, seed + 1), *noisy(12, 10, seed + 2)]
    assert began(watched(losses)) == 8 + 1 + gap + 1


def test_the_threshold_is_the_one_that_was_set() -> None:
    losses = [3.0] * 10 + [6.0] * 10
    assert watched(losses, spike=2.5) is not None
    assert watched(losses, spike=3.5) is None


@given(losses=st.lists(st.floats(0, 9), min_size=12, max_size=60), cut=st.integers(0, 60))
def test_a_watch_goes_on_from_what_another_had_seen(losses: list[float], cut: int) -> None:
    first, second = DivergenceWatch(SPIKE), DivergenceWatch(SPIKE)
    for step, loss in enumerate(losses, 1):
        if step == cut + 1:
            second.restore(json.loads(json.dumps(first.state())))
        said: list[bool] = []
        for watch in (first, second) if step > cut else (first,):
            try:
                watch.see(step, loss)
                said.append(False)
            except Diverged:
                said.append(True)
        assert len(set(said)) == 1
        if said[0]:
            return


COUNTS = TokenCounts(2, 64, 50, 20)


def test_more_steps_than_there_is_memory_for_arrive_all_the_same() -> None:
    relay = LossRelay(torch.device("cpu"))
    for step in range(1, 3001):
        relay.push(step, torch.tensor(float(step)), COUNTS)
    assert [(record.step, record.loss) for record in relay.arrived()] == [(n, float(n)) for n in range(1, 3001)]


@given(losses=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40), data=st.data())
def test_every_step_arrives_once_in_order_with_its_own_loss(losses: list[float], data: st.DataObject) -> None:
    relay = LossRelay(torch.device("cpu"))
    arrived: list[Step] = []
    for step, loss in enumerate(losses, 1):
        tensor = torch.tensor(loss)
        relay.push(step, tensor, TokenCounts(step, 2, 3, 4), torch.tensor(2.0 ** -(step // 3)))
        tensor.fill_(-1.0)  # as training goes on, the tensor is used again
        if data.draw(st.booleans()):
            arrived += relay.arrived()
    arrived += relay.arrived()
    assert relay.arrived() == []
    assert [record.step for record in arrived] == list(range(1, len(losses) + 1))
    assert [record.loss for record in arrived] == losses
    assert [record.rows for record in arrived] == [record.step for record in arrived]
    assert [record.skipped for record in arrived] == [record.step % 3 == 0 for record in arrived]


def test_a_step_takes_the_time_since_the_one_before() -> None:
    relay = LossRelay(torch.device("cpu"))
    for step in range(1, 6):
        relay.push(step, torch.tensor(1.0), COUNTS)
    records = relay.arrived()
    assert records[0].seconds is None
    for before, after in pairwise(records):
        assert after.seconds == pytest.approx(after.t - before.t, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_loss_that_is_no_number_arrives_as_such_in_any_format(dtype: torch.dtype) -> None:
    relay = LossRelay(torch.device("cpu"))
    relay.push(1, torch.tensor(math.nan, dtype=dtype), COUNTS)
    relay.push(2, torch.tensor(math.inf, dtype=dtype), COUNTS)
    nan, inf = relay.arrived()
    assert math.isnan(nan.loss)
    assert math.isinf(inf.loss)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_grad_scaler_skipped_is_seen_also_with_fused_optimizers(fused: bool) -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    relay = LossRelay(torch.device("cpu"), first_scale=scaler.get_scale())
    for step, factor in enumerate((1.0, math.inf), 1):
        scaler.scale((weight * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        relay.push(step, torch.tensor(1.0), COUNTS, scaler._scale)
    assert [record.skipped for record in relay.arrived()] == [False, True]
