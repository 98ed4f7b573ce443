"""Two sides beside each other: planted truths over many seeds, and what stands in words."""

import dataclasses
import io
import math
import random
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
from conftest import some_by_day
from planted import trial
from rich.console import Console
from scipy import stats

from lora_lab.config import InvalidInput
from lora_lab.report.answers.compare.comparison import (
    BETTER,
    CANNOT_TELL,
    NO_DIFFERENCE,
    WITHIN,
    WORSE,
    SideComparison,
    compare,
    exit_code,
)
from lora_lab.report.answers.compare.display import show
from lora_lab.report.measures import ENERGY, LOSS, THROUGHPUT, VRAM, Measure
from lora_lab.report.statistics.estimates import estimate
from lora_lab.store.trials import Trial

SEEDS = 100


def grid(
    side: str,
    seed: int,
    *,
    slower: float = 1.0,
    noise: float = 0.01,
    block: float = 0.0,
    repeats: int = 3,
    lossy: float = 0.0,
    **more: object,
) -> list[Trial]:
    """Eight points, `repeats` times: throughput and energy with `noise` on each trial and `block` on each block."""
    draw = random.Random(f"{side} {seed}")
    found = []
    for repeat in range(repeats):
        shared = draw.gauss(0, block)
        for number in range(8):
            rate = 1000 * (1 + number) / slower * math.exp(draw.gauss(0, noise) + shared)
            energy = 0.1 / (1 + number) * slower * math.exp(draw.gauss(0, noise) + shared)
            told = {THROUGHPUT.key: rate, ENERGY.key: energy, VRAM.key: 4.0 + number}
            told[LOSS.key] = 1.5 + lossy + draw.gauss(0, noise)
            settings = {"batch_size": str(2 ** (number % 2)), "seq_len": str(2 ** (7 + number // 2))}
            found.append(trial(told, sweep=side, repeat=repeat, **settings, **more))  # type: ignore[arg-type]
    return found


def against(one: Sequence[Trial], other: Sequence[Trial], tolerance: float = 0.0) -> SideComparison:
    return compare((one, []), (other, []), tolerance)


def verdicts(comparison: SideComparison) -> dict[str, str]:
    return {result.measure.name: result.verdict for result in comparison.results}


def text_of(comparison: SideComparison) -> str:
    console = Console(file=io.StringIO(), width=80)
    show(comparison, console)
    written = console.file
    assert isinstance(written, io.StringIO)
    return " ".join(written.getvalue().split())


@pytest.mark.parametrize(
    ("block", "repeats"), some_by_day([(0.0, 2), (0.0, 3), (0.03, 2), (0.03, 3)], by_day=[(0.0, 2), (0.03, 3)])
)
def test_where_nothing_changed_the_gate_stays_open(block: float, repeats: int) -> None:
    """At most 2.5 % a measure are expected; three measures are noisy here. With slow blocks throughput and energy are
    off together, so each is counted by itself."""
    alarms = {"throughput": 0, "energy": 0, "vram": 0, "loss": 0}
    for seed in range(SEEDS):
        found = against(
            grid("one", seed, block=block, repeats=repeats), grid("other", seed, block=block, repeats=repeats)
        )
        for result in found.results:
            alarms[result.measure.name] += result.alarms
    assert alarms["vram"] == 0
    # more than 8 of 100 at 2.5 % has a chance of 0.1 %
    assert all(count <= 8 for count in alarms.values()), alarms


def test_a_tenth_slower_under_one_percent_of_noise_is_always_caught() -> None:
    for seed in range(SEEDS):
        found = against(grid("one", seed, slower=1.1), grid("other", seed))
        assert exit_code(found) == 1
        assert verdicts(found) | {"loss": ""} == {
            "throughput": WORSE,
            "energy": WORSE,
            "vram": NO_DIFFERENCE,
            "loss": "",
        }


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    held = 0
    for seed in range(SEEDS):
        found = against(grid("one", seed, slower=1.05), grid("other", seed)).results[0].estimate
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        held += found.low <= -math.log(1.05) <= found.high
    assert held >= 0.89 * SEEDS


@pytest.mark.nightly
def test_what_could_have_been_seen_is_seen_four_times_in_five() -> None:
    told = against(grid("one", 0), grid("other", 0)).results[0].estimate
    assert told is not None
    assert told.detectable is not None
    # by the wider of two intervals a true difference of so much is found at least about as often
    seen = sum(
        against(grid("one", seed, slower=math.exp(told.detectable)), grid("other", seed)).results[0].verdict == WORSE
        for seed in range(SEEDS)
    )
    assert seen >= 0.6 * SEEDS


def test_faster_is_better_and_passes() -> None:
    found = against(grid("one", 1, slower=0.9), grid("other", 1))
    assert (verdicts(found)["throughput"], verdicts(found)["energy"]) == (BETTER, BETTER)
    assert exit_code(found) == 0


def test_a_tolerance_lets_pass_what_it_says() -> None:
    one, other = grid("one", 1, slower=1.05), grid("other", 1)
    assert exit_code(against(one, other)) == 1
    assert exit_code(against(one, other, tolerance=0.10)) == 0
    assert exit_code(against(grid("one", 1, slower=1.2), other, tolerance=0.10)) == 1
    with pytest.raises(InvalidInput, match="Give a share"):
        against(one, other, tolerance=-0.1)


def test_what_lies_within_the_tolerance_is_told_to() -> None:
    one, other = grid("one", 1, slower=1.03), grid("other", 1)
    assert verdicts(against(one, other))["throughput"] == WORSE
    found = against(one, other, tolerance=0.06)
    assert verdicts(found) == {"throughput": WITHIN, "energy": WITHIN, "vram": WITHIN, "loss": WITHIN}
    assert verdicts(against(one, other, tolerance=0.03))["throughput"] == WORSE
    assert verdicts(against(grid("one", 1, lossy=0.2), other, tolerance=0.15))["loss"] == WITHIN
    assert verdicts(against(grid("one", 1, lossy=0.2), other, tolerance=0.10))["loss"] == WORSE


def without(measure: Measure, trials: Sequence[Trial], kept: int = 0) -> list[Trial]:
    """The trials, all but the first few of them without this figure."""
    return [
        each
        if at < kept
        else dataclasses.replace(each, metrics={k: v for k, v in each.metrics.items() if k != measure.key})
        for at, each in enumerate(trials)
    ]


def test_a_figure_that_the_new_side_lost_does_not_pass() -> None:
    one, other = grid("one", 2), grid("other", 2)
    found = against(without(ENERGY, one), other)
    assert exit_code(found) == 3
    assert "inconclusive for: energy" in text_of(found)
    assert exit_code(against(one, without(ENERGY, other))) == 0, "it never had any"
    assert exit_code(against(without(ENERGY, grid("one", 2, slower=1.1)), other)) == 1, "worse goes before lost"
    some = against(without(ENERGY, grid("one", 2, repeats=1), kept=5), grid("other", 2, repeats=1))
    assert "3 points left out because this side has no figure for them" in text_of(some)


def test_drift_between_two_sweeps_is_in_no_interval_and_that_is_said() -> None:
    found = against(grid("one", 3), grid("other", 3))
    assert "not included in the intervals below" in text_of(found)
    assert "--tolerance" in found.cautions[-1]
    assert "--tolerance" not in against(grid("one", 3), grid("other", 3), tolerance=0.02).cautions[-1]
    both = grid("same", 3) + grid("same", 4, optimizer="paged_adamw")
    assert against(both[:24], both[24:]).cautions[-1].startswith("they differ in all trials")


def test_loss_is_compared_by_differences() -> None:
    found = against(grid("one", 1, lossy=0.2), grid("other", 1))
    [result] = [result for result in found.results if result.measure == LOSS]
    assert result.verdict == WORSE
    assert result.estimate is not None
    assert result.estimate.value == pytest.approx(0.2, abs=0.02)
    assert "nats per token" in text_of(found)


def test_no_repeats_are_judged_by_the_points() -> None:
    same = against(grid("one", 2, repeats=1), grid("other", 2, repeats=1))
    assert same.results[0].verdict == NO_DIFFERENCE
    assert "no repeats" in same.results[0].basis
    assert exit_code(against(grid("one", 2, repeats=1, slower=1.1), grid("other", 2, repeats=1))) == 1


def lone(rate: float, error: float | None = 5.0, **more: str) -> list[Trial]:
    told = {THROUGHPUT.key: rate}
    if error is not None:
        told[f"{THROUGHPUT.key}_error"] = error
    return [trial(told, sweep=None, **more)]


def test_lone_trials_need_a_tolerance_to_be_told_apart() -> None:
    """Their own errors say nothing of how runs differ."""
    same = against(lone(1000), lone(1004))
    assert same.results[0].verdict == NO_DIFFERENCE
    assert exit_code(same) == 0
    apart = against(lone(900), lone(1000))
    assert apart.results[0].verdict == CANNOT_TELL
    assert "variation between runs of the same settings is not included" in text_of(apart)
    assert exit_code(apart) == 3
    assert exit_code(against(lone(900), lone(1000), tolerance=0.05)) == 1
    assert exit_code(against(lone(900), lone(1000), tolerance=0.101)) == 3  # its interval holds the tolerance
    passed = against(lone(900), lone(1000), tolerance=0.20)
    assert (passed.results[0].verdict, exit_code(passed)) == (WITHIN, 0)
    assert exit_code(against(lone(900, None), lone(1000, None), tolerance=0.05)) == 3


def test_peaks_of_lone_trials_are_read_to_a_page() -> None:
    def peak(gib: float) -> list[Trial]:
        return [trial({VRAM.key: gib}, sweep=None)]

    assert verdicts(against(peak(6.0), peak(6.0)))["vram"] == NO_DIFFERENCE
    assert exit_code(against(peak(6.6), peak(6.0))) == 3
    assert exit_code(against(peak(6.6), peak(6.0), tolerance=0.05)) == 1
    assert exit_code(against(peak(6.2), peak(6.0), tolerance=0.05)) == 0


def test_lone_trials_are_compared_whatever_their_settings() -> None:
    found = against(lone(900, batch_size="2"), lone(1000, optimizer="paged_adamw"), tolerance=0.05)
    assert found.results[0].verdict == WORSE
    assert {each.what for each in found.settings} == {"batch_size", "optimizer", "optimizer.optim"}
    assert "they differ in all trials in batch_size 2 against 1" in text_of(found)


def test_sweeps_are_matched_point_by_point() -> None:
    """A point that only one side has does not count, however slow."""
    more = grid("one", 3) + [
        trial({THROUGHPUT.key: 1.0}, sweep="one", repeat=number, batch_size="64") for number in range(3)
    ]
    found = against(more, grid("other", 3))
    assert found.matched == 8
    assert found.only_one == ("64x512",)
    assert verdicts(found)["throughput"] == NO_DIFFERENCE


def test_a_setting_that_an_older_version_had_not_is_told_of_and_not_matched_by() -> None:
    found = against(grid("one", 4, new_setting="1"), grid("other", 4))
    assert found.matched == 8
    [difference] = found.settings
    assert (difference.what, difference.one, difference.other) == ("new_setting", "1", "absent")


def test_a_point_that_no_longer_fits_shuts_the_gate() -> None:
    full = grid("other", 5)
    lost = [each for each in grid("other", 5) if each.params["seq_len"] != "1024"]
    lost += [trial({}, outcome="out_of_memory", sweep="other", repeat=n, seq_len="1024") for n in range(3)]
    found = against(lost, full)
    assert exit_code(found) == 1
    [change] = found.outcomes
    assert (change.one, change.other, change.worse) == ("out of memory 3 of 3", "finished 3 of 3", True)
    assert exit_code(against(full, lost)) == 0


def test_a_crash_counts_and_a_kill_or_a_mended_attempt_does_not() -> None:
    other = lone(1000)
    crashed = against([trial({}, outcome="failed", sweep=None)], other)
    assert exit_code(crashed) == 1
    assert exit_code(against([trial({}, outcome="killed", sweep=None)], other)) == 3
    grids = grid("one", 6)
    mended = [trial({}, outcome="failed", sweep="one", batch_size="1", seq_len="128"), *grid("one", 6)]
    assert exit_code(against(mended, grids)) == exit_code(against(grids, grids)) == 0


def test_other_cards_stand_on_top_in_words() -> None:
    found = against(grid("one", 7, device="NVIDIA H200", unit="GPU-9"), grid("other", 7))
    assert found.cautions[0].startswith("different cards: NVIDIA H200 against NVIDIA H100")
    assert {each.what for each in found.surroundings} == {"device", "device.uuid"}
    text = text_of(found)
    assert text.index("different cards") < text.index("throughput")


CAUTIONS = {
    "cards": "different cards",
    "units": "two devices with the same name",
    "versions": "different versions",
    "this dirty": "this ran uncommitted code",
    "other dirty": "the other ran uncommitted code",
    "this places": "this ran in 2 environments",
    "other places": "the other ran in 2 environments",
    "throughout": "they differ in all trials in",
    "drift": "the two ran at different times",
}
OTHER_CARD = {"device": "NVIDIA H200", "unit": "GPU-9"}


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ({"side": "same", "optimizer": "paged_adamw"}, {"side": "same"}, {"throughout"}),
        ({}, {}, {"drift"}),
        (OTHER_CARD, {}, {"cards", "drift"}),
        ({"unit": "GPU-2"}, {}, {"units", "drift"}),
        ({"tags": {"version.torch": "2.12.0"}}, {}, {"versions", "drift"}),
        ({"tags": {"dirty": "true"}}, {}, {"this dirty", "drift"}),
        ({}, {"tags": {"dirty": "true"}}, {"other dirty", "drift"}),
        ({"optimizer": "paged_adamw"}, {}, {"throughout", "drift"}),
        (OTHER_CARD | {"tags": {"dirty": "true"}}, {"seq_len": "64"}, {"cards", "this dirty", "drift"}),
        ({"also": {"unit": "GPU-2"}}, {}, {"this places", "drift"}),
        ({}, {"also": {"unit": "GPU-2"}}, {"other places", "drift"}),
        ({"side": "same", "unit": "GPU-2", "optimizer": "paged_adamw"}, {"side": "same"}, {"units", "throughout"}),
    ],
)
def test_each_caution_stands_where_its_reason_does(
    one: dict[str, Any], other: dict[str, Any], expected: set[str]
) -> None:
    def side(name: str, told: dict[str, Any]) -> list[Trial]:
        told = dict(told)
        name, also, length = told.pop("side", name), told.pop("also", None), told.pop("seq_len", None)
        made = grid(name, 1, **told) + (grid(name, 1, repeats=1, **also) if also else [])
        return [each for each in made if length is None or each.params["seq_len"] != length]

    cautions = against(side("one", one), side("other", other)).cautions
    assert [sum(words in caution for words in CAUTIONS.values()) for caution in cautions] == [1] * len(cautions)
    assert {name for name, words in CAUTIONS.items() if any(words in caution for caution in cautions)} == expected


def test_one_sweep_that_ran_both_sides_is_compared_by_pairs() -> None:
    """What makes a block slow falls out. It leaves the interval over three blocks, or that over eight points of three
    pairs where that is the wider."""
    reach = []
    for seed in range(40):
        both = grid("same", seed, noise=0.0, block=0.3)
        draw = random.Random(f"pairs {seed}")
        other = [
            dataclasses.replace(
                each,
                run_id=f"{each.run_id} other",
                params=each.params | {"optimizer": "paged_adamw"},
                metrics=each.metrics | {THROUGHPUT.key: each.metrics[THROUGHPUT.key] * math.exp(draw.gauss(0.1, 0.01))},
            )
            for each in both
        ]
        found = against(other, both).results[0]
        assert found.verdict == BETTER
        assert "paired by block" in found.basis
        assert found.estimate is not None
        assert found.estimate.high is not None
        reach.append(found.estimate.high - found.estimate.value)
    over_repeats, over_blocks = (estimate(0.0, 0.01 / math.sqrt(24), df).high for df in (16, 2))
    assert over_repeats is not None
    assert over_blocks is not None
    assert over_repeats < statistics.fmean(reach) < 1.1 * over_blocks


def test_one_point_has_the_interval_of_welchs_test() -> None:
    rates = [1000.0, 1010.0, 1030.0], [900.0, 905.0, 990.0, 940.0]
    sides = [
        [trial({THROUGHPUT.key: rate}, sweep=sweep, repeat=repeat) for repeat, rate in enumerate(each)]
        for sweep, each in zip(("one", "other"), rates, strict=True)
    ]
    found = against(*sides).results[0].estimate
    assert found is not None
    known = stats.ttest_ind(*([math.log(rate) for rate in each] for each in rates), equal_var=False)
    assert (found.low, found.high) == pytest.approx(tuple(known.confidence_interval()))


@pytest.mark.nightly
def test_intervals_are_no_wider_than_by_blocks_or_trials() -> None:
    """Two sweeps, steady: the wider of an interval over 32 degrees of freedom and of one over about four."""
    reach = []
    for seed in range(SEEDS):
        found = against(grid("one", seed), grid("other", seed)).results[0].estimate
        assert found is not None
        assert found.high is not None
        reach.append(found.high - found.value)
    error = 0.01 * math.sqrt(2 / 24)
    assert estimate(0.0, error, 32).high < statistics.fmean(reach) < 1.25 * (estimate(0.0, error, 4).high or 0)


def test_two_places_on_one_side_are_not_averaged() -> None:
    both = grid("one", 8) + grid("one", 8, slower=3.0, unit="GPU-2", repeats=2)
    found = against(both, grid("other", 8))
    assert verdicts(found)["throughput"] == NO_DIFFERENCE
    assert any("16 trials left out" in caution for caution in found.cautions)


def test_a_driver_page_of_memory_is_no_difference_and_a_tenth_is() -> None:
    def memory(side: str, gib: float) -> list[Trial]:
        return [trial({VRAM.key: gib}, sweep=side, repeat=number) for number in range(3)]

    assert verdicts(against(memory("one", 6.0 + 2 / 1024), memory("other", 6.0)))["vram"] == NO_DIFFERENCE
    assert verdicts(against(memory("one", 6.1), memory("other", 6.0)))["vram"] == WORSE


def test_random_weights_have_no_loss_to_compare() -> None:
    found = against(grid("one", 9, model__weights="random"), grid("other", 9, model__weights="random"))
    assert verdicts(found)["loss"] == CANNOT_TELL
    assert "held-out loss says nothing about random weights" in text_of(found)


def test_invalid_trials_do_not_count() -> None:
    slow = [
        trial({THROUGHPUT.key: 1.0}, sweep="one", repeat=number, validity="invalid", batch_size="1", seq_len="128")
        for number in range(3, 9)
    ]
    assert verdicts(against(grid("one", 10) + slow, grid("other", 10)))["throughput"] == NO_DIFFERENCE


def test_jobs_are_not_compared_with_windows() -> None:
    jobs = [trial({THROUGHPUT.key: 1.0}, sweep="one", batch_size="1", train__max_steps="3")]
    windows = [trial({THROUGHPUT.key: 1.0}, sweep="other", batch_size="1", train__max_steps="None")]
    for one, other in ((jobs, windows), (windows, jobs), (jobs + windows, windows)):
        with pytest.raises(InvalidInput, match="whole training"):
            compare((one, []), (other, []))
    compare((jobs, []), (jobs, []))


def test_nothing_on_a_side_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no trial"):
        compare(([], []), (lone(1), []))
