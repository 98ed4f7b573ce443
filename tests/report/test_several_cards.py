"""A sweep whose points ran side by side on several cards of one kind, which are one place and no effect of points."""

import dataclasses
import math
import random

import numpy as np
import pytest
from planted import factorial, trial

from lora_lab.report.findings import Question, find
from lora_lab.report.measures import THROUGHPUT, VRAM
from lora_lab.report.statistics.blocks import between_cards, figures
from lora_lab.report.statistics.cards import Placed, card_effects
from lora_lab.report.statistics.contrasts import contrasts
from lora_lab.report.statistics.factors import Factor
from lora_lab.report.writing.headline import notes
from lora_lab.store.trials import Trial, groups

RATE, MEMORY = "throughput/tokens_per_second", "vram/peak_device_gib"
LEVELS = {"optimizer": ("adamw", "paged_adamw"), "precision": ("fp16", "bf16")}
EFFECT, APART = 0.02, 0.04


def beside(trials: list[Trial], seed: int, cards: int = 2, apart: float = APART) -> list[Trial]:
    """The same trials on several cards: in each block in random order, one after the other on the next card. The last
    card is faster than the first by `apart`."""
    draw, placed = random.Random(seed), []
    for repeat in sorted({each.repeat for each in trials}):
        block = [each for each in trials if each.repeat == repeat]
        draw.shuffle(block)
        for number, each in enumerate(block):
            card = number % cards
            faster = math.exp(apart * card / (cards - 1))
            tags = each.tags | {"device.uuid": f"GPU-{card}", "slot": f"gpu:{card}"}
            metrics = {key: value * faster if key == RATE else value for key, value in each.metrics.items()}
            placed.append(dataclasses.replace(each, tags=tags, metrics=metrics))
    return placed


def sweep(seed: int, repeats: int = 5, apart: float = APART, noise: float = 0.005) -> list[Trial]:
    planted = factorial(
        LEVELS, {"optimizer=paged_adamw": EFFECT}, noise=noise, drift=0.01, repeats=repeats, random=seed
    )
    return beside(planted, seed, apart=apart)


def contrast(trials: list[Trial]) -> tuple[float, float, float]:
    """The optimizer's effect with its interval."""
    factor = Factor(name="optimizer", keys=("optimizer",), levels=("adamw", "paged_adamw"))
    [found] = contrasts(trials, [factor], THROUGHPUT)
    told = found.this_session
    assert told.low is not None
    assert told.high is not None
    return told.value, told.low, told.high


def test_the_cards_of_one_sweep_are_one_place_and_those_of_several_are_not() -> None:
    together = sweep(0)
    elsewhere = [dataclasses.replace(each, sweep="other", run_id=f"{each.run_id} again") for each in together]
    alone = [dataclasses.replace(each, tags={k: v for k, v in each.tags.items() if k != "slot"}) for each in elsewhere]
    [one] = groups(together)
    assert len(one.measured) == 20
    assert (one.place.unit, one.place.label) == ("GPU-0 and GPU-1", "2 x NVIDIA H100 80GB HBM3")
    assert sorted(len(group.measured) for group in groups([*together, *alone])) == [10, 10, 20]


def test_a_trial_that_resume_ran_alone_on_one_of_the_cards_stays_with_its_sweep() -> None:
    together = sweep(0)
    tags = {key: text for key, text in together[-1].tags.items() if key != "slot"}
    [one] = groups([*together[:-1], dataclasses.replace(together[-1], tags=tags)])
    assert len(one.measured) == 20


def test_what_cards_add_is_taken_out_and_intervals_hold_as_often_as_they_say() -> None:
    found = [contrast(sweep(seed)) for seed in range(200)]
    assert sum(low <= EFFECT <= high for _, low, high in found) in range(180, 198)
    width = float(np.median([high - low for _, low, high in found]))
    alone = factorial(LEVELS, noise=0.005, drift=0.01, repeats=5)
    same = [contrast(sweep(seed, apart=0.0)) for seed in range(50)]
    assert width == pytest.approx(np.median([high - low for _, low, high in same]), rel=0.15), "as if cards were equal"
    assert width < 2 * (contrast(alone)[2] - contrast(alone)[1])


def test_how_far_cards_are_apart_is_told_of_speed_and_never_of_memory() -> None:
    trials = sweep(3, repeats=8)
    assert between_cards(trials, THROUGHPUT) == pytest.approx(APART, abs=0.006)
    with_memory = [dataclasses.replace(each, metrics=each.metrics | {MEMORY: 3.25}) for each in trials]
    assert between_cards(with_memory, VRAM) is None
    assert {each.value for each in figures(with_memory, VRAM)} == {math.log(3.25)}
    [said] = [note for note in notes(find(trials, (), Question(), "1")) if "2 cards" in note]
    assert "throughput" in said
    assert "%" in said


def test_nothing_is_taken_out_where_cards_and_points_cannot_be_told_apart() -> None:
    once = sweep(0, repeats=1)
    plain = sorted(math.log(each.metrics[RATE]) for each in once)
    assert sorted(each.value for each in figures(once, THROUGHPUT)) == plain
    assert between_cards(once, THROUGHPUT) is None
    assert [note for note in notes(find(once, (), Question(), "1")) if "2 cards" in note]
    fixed = [Placed(str(n), (str(n % 2),), n // 2, f"GPU-{n % 2}", float(n % 2)) for n in range(40)]
    assert card_effects(fixed) == {}, "a point that always has the same card"


def test_trials_on_one_card_are_as_they_were() -> None:
    trials = [trial({RATE: 500.0 + n}, repeat=n) for n in range(4)]
    assert [each.value for each in figures(trials, THROUGHPUT)] == [math.log(500.0 + n) for n in range(4)]
    assert not [note for note in notes(find(trials, (), Question(), "1")) if "cards" in note]
