"""The estimate that contrasts, best, compare and claims share, beside scipy's and statsmodels' own."""

import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.regression.linear_model import OLS

from lora_lab.report.measures import LOSS, THROUGHPUT, VRAM
from lora_lab.report.statistics.averages import average
from lora_lab.report.statistics.differences import (
    ONE_EACH,
    ONE_PAIR,
    Difference,
    Noise,
    by_block,
    difference,
    paired,
    pooled_noise,
    unpaired,
    with_resolution,
)
from lora_lab.report.statistics.estimates import Estimate, estimate

SAMPLES = st.lists(st.floats(-1, 1).map(lambda value: round(value, 3)), min_size=2, max_size=6)


def blocks(values: list[float], sweep: str = "sweep", first: int = 0) -> dict[tuple[str, int], float]:
    return {(sweep, first + number): value for number, value in enumerate(values)}


def pairs(*settings: list[float]) -> list[Difference]:
    """Differences of pairs, each setting's from block 0 on."""
    return [Difference(value=statistics.fmean(each), samples=(blocks(each),)) for each in settings]


def ends(found: Estimate) -> tuple[float, float]:
    assert found.low is not None
    assert found.high is not None
    return found.low, found.high


def half(found: Estimate) -> float:
    return ends(found)[1] - found.value


@given(SAMPLES, SAMPLES)
def test_pairs_have_the_interval_of_the_paired_t_test(one: list[float], other: list[float]) -> None:
    size = min(len(one), len(other))
    assume(statistics.pstdev([a - b for a, b in zip(one[:size], other[:size], strict=True)]) > 1e-6)
    found = difference(blocks(one[:size]), blocks(other[:size]))
    assert found.is_paired
    known = stats.ttest_rel(one[:size], other[:size]).confidence_interval()
    assert ends(found.estimate()) == pytest.approx((known.low, known.high))


@given(SAMPLES, SAMPLES)
def test_other_blocks_have_the_interval_of_welchs_test(one: list[float], other: list[float]) -> None:
    assume(min(statistics.pstdev(one), statistics.pstdev(other)) > 1e-6)  # scipy warns of others
    found = difference(blocks(one), blocks(other, first=9))
    known = stats.ttest_ind(one, other, equal_var=False).confidence_interval()
    assert ends(found.estimate()) == pytest.approx((known.low, known.high))
    assert found.basis() == f"{len(one)} against {len(other)} trials, unpaired"


def test_a_single_trial_takes_the_noise_of_the_rest() -> None:
    values = [[1.0, 1.2, 1.7], [2.0, 2.1], [3.0]]
    noise = pooled_noise(map(blocks, values))
    columns = np.array([[row == group for group in range(3)] for row in (0, 0, 0, 1, 1, 2)], dtype=float)
    fitted = OLS([value for group in values for value in group], columns).fit()
    found = unpaired(blocks(values[2]), blocks(values[0])).estimate(noise)
    assert ends(found) == pytest.approx(fitted.t_test([-1, 0, 1]).conf_int()[0])
    assert pooled_noise([blocks([1.0])]) is None


@pytest.mark.parametrize(
    ("of", "over", "basis", "value"),
    [
        (blocks([1, 2, 9]), blocks([0, 0]), "paired over 2 blocks", 1.5),
        (blocks([1, 2, 9]), blocks([0, 0], first=2), "3 against 2 trials, unpaired", 4.0),  # one shared says less
        (blocks([1, 2, 9]), blocks([0], first=1), "1 against 1 trials, with the noise of all repeated ones", 2.0),
        (blocks([1, 2, 9]), blocks([0], "other"), "3 against 1 trials, with the noise of all repeated ones", 4.0),
        (blocks([1, 2, 9], ""), blocks([0, 0, 0], ""), "3 against 3 trials, unpaired", 4.0),  # of no sweep
    ],
)
def test_pairs_come_first_and_borrowed_noise_last(of, over, basis: str, value: float) -> None:
    found, noise = difference(of, over), Noise(variance=0.25, df=4)
    assert (found.basis(noise), found.value) == (basis, value)
    if "noise" in basis:
        sizes = [len(sample) for sample in found.samples]
        assert half(found.estimate(noise)) == pytest.approx(0.5 * math.sqrt(1 + 1 / sizes[0]) * stats.t.isf(0.025, 4))
        assert found.estimate().why_no_interval == ONE_EACH
        assert found.basis() == ""


def test_one_pair_has_no_interval_and_no_shared_block_no_pair() -> None:
    found = paired(blocks([1.0], ""), blocks([3.0], ""))
    assert found is not None
    assert (found.value, found.estimate().low, found.estimate().why_no_interval) == (-2.0, None, ONE_PAIR)
    assert paired(blocks([1.0]), blocks([1.0], first=1)) is None


def test_of_several_intervals_all_hold_together() -> None:
    found = paired(blocks([1.0, 1.2, 1.7]), blocks([0.0, 0.0, 0.0]))
    assert found is not None
    single, sixth = found.estimate(), found.estimate(among=6)
    assert half(sixth) / half(single) == pytest.approx(stats.t.isf(0.025 / 6, 2) / stats.t.isf(0.025, 2))


def test_a_point_that_a_block_holds_twice_counts_once() -> None:
    from planted import trial

    from lora_lab.report.statistics.blocks import figures

    twice = [trial({LOSS.key: loss}, repeat=repeat) for repeat, loss in ((0, 1.0), (0, 2.0), (1, 4.0))]
    assert by_block(figures(twice, LOSS)) == {("sweep0", 0): 1.5, ("sweep0", 1): 4.0}


def test_repeats_that_agree_show_no_less_than_the_measure_resolves() -> None:
    exact = estimate(0.0, 0.0, 4)
    page = with_resolution(exact, VRAM, 8.0)
    assert ends(page) == pytest.approx((-1 / 4096, 1 / 4096))
    assert page.detectable == pytest.approx(1 / 4096)
    assert ends(with_resolution(exact, LOSS, 2.0)) == pytest.approx((-2e-9, 2e-9))
    assert ends(with_resolution(exact, THROUGHPUT, 500.0)) == pytest.approx((-1e-9, 1e-9))
    wide = estimate(0.1, 0.02, 4)
    assert with_resolution(wide, VRAM, 8.0) == wide
    none = Estimate(value=1.0, why_no_interval="one")
    assert with_resolution(none, VRAM, 8.0) is none


# The average over settings


def test_settings_of_their_own_noise_have_welchs_interval() -> None:
    samples = [[0.1, 0.2, 0.4], [0.9, 0.1], [0.3, 0.5, 0.4, 0.1]]
    found = average(pairs(*samples))
    shares = [(statistics.variance(each) / len(each) / 9, len(each) - 1) for each in samples]
    variance = sum(share for share, _ in shares)
    df = variance**2 / sum(share**2 / df for share, df in shares)
    assert found.session_over == "repeats"
    assert half(found.this_session) == pytest.approx(stats.t.isf(0.025, df) * math.sqrt(variance))


def test_a_setting_with_one_pair_takes_the_pooled_noise_where_settings_agree() -> None:
    samples = [[0.2, 0.4, 0.6], [0.35, 0.5], [0.41]]
    found = average(pairs(*samples))
    rows = [number for number, each in enumerate(samples) for _ in each]
    columns = np.array([[row == group for group in range(3)] for row in rows], dtype=float)
    fitted = OLS([value for each in samples for value in each], columns).fit()
    assert found.session_over == "repeats"
    assert ends(found.this_session) == pytest.approx(fitted.t_test([1 / 3] * 3).conf_int()[0])


@pytest.mark.parametrize("samples", [[[0.2, 0.21], [0.5], [0.9]], [[0.2], [0.5], [0.9]]])
def test_and_the_spread_over_settings_where_they_do_not(samples: list[list[float]]) -> None:
    found = average(pairs(*samples))
    known = stats.ttest_1samp([statistics.fmean(each) for each in samples], 0.0).confidence_interval()
    assert found.interval_over == "settings"
    assert ends(found.estimate) == pytest.approx((known.low, known.high))


@given(st.lists(st.floats(-1, 1).map(lambda value: round(value, 2)), min_size=4, max_size=4), st.integers(0, 10_000))
def test_for_sessions_like_it_the_wider_interval_counts_over_repeats_or_over_blocks(
    shift: list[float], seed: int
) -> None:
    """Complete, the interval over blocks is Student's over their means."""
    draw = random.Random(seed)
    samples = [[0.3 * number + each + draw.gauss(0, 0.3) for each in shift] for number in range(3)]
    found = average(pairs(*samples))
    known = stats.ttest_1samp(np.mean(samples, axis=0), 0.0).confidence_interval()
    own = estimate(0.0, math.sqrt(sum(statistics.variance(each) / 4 / 9 for each in samples)), 9)
    assert found.by_blocks is not None
    assert ends(found.by_blocks) == pytest.approx((known.low, known.high))
    assert half(found.estimate) == max(half(found.this_session), half(found.by_blocks))
    assert half(found.this_session) <= 1.35 * half(own)  # Satterthwaite's fewer degrees of freedom than 9, at least 3
    assert found.interval_over == ("blocks" if half(found.by_blocks) > half(found.this_session) else "repeats")


def test_one_setting_has_one_interval_and_two_blocks_only_that_of_the_session() -> None:
    alone, two = average(pairs([0.1, 0.2, 0.4])), average(pairs([0.1, 0.2], [0.3, 0.5]))
    assert alone.sessions_like_it == alone.this_session  # its pairs are the blocks
    assert two.sessions_like_it is None
    assert two.estimate == two.this_session


def test_blocks_that_share_no_setting_stand_about_one_level() -> None:
    """Settings that differ by far, each in blocks of its own: what is left in the blocks is their noise."""
    near, far = {("s", 0): 1.0, ("s", 1): 1.2}, {("s", 2): 9.0, ("s", 3): 9.4}
    found = average([Difference(value=statistics.fmean(each.values()), samples=(each,)) for each in (near, far)])
    assert found.by_blocks is not None
    assert half(found.by_blocks) < 1.0


def test_unpaired_sides_are_as_unsure_as_their_blocks() -> None:
    """A slow block is in every point of its side, so more points do not average it out."""
    slow = [0.0, 0.1, 0.2]
    settings = [
        unpaired(blocks([number + each for each in slow], "one"), blocks([number] * 3, "other")) for number in range(8)
    ]
    found = average(settings)
    assert found.interval_over == "blocks"
    assert half(found.estimate) == pytest.approx(stats.t.isf(0.025, 2) * statistics.stdev(slow) / math.sqrt(3))
    lone = [unpaired(blocks([0.0, 0.1], ""), blocks([0.0, 0.2], "")) for _ in range(4)]
    assert average(lone).by_blocks is None


# Widths, from above


def c4(size: int) -> float:
    """Return the mean of a standard deviation of this many normal figures, divided by the true one."""
    return math.sqrt(2 / (size - 1)) * math.gamma(size / 2) / math.gamma((size - 1) / 2)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_mean_widths_are_those_of_the_exact_formula(size: int) -> None:
    draw = random.Random(size)

    def side(sweep: str) -> dict[tuple[str, int], float]:
        return blocks([draw.gauss(0, 0.01) for _ in range(size)], sweep)

    n = 2000
    by_pairs = statistics.fmean(half(difference(side("s"), side("s")).estimate()) for _ in range(n))
    assert by_pairs == pytest.approx(stats.t.isf(0.025, size - 1) * 0.01 * math.sqrt(2 / size) * c4(size), rel=0.1)
    noise = [pooled_noise([side("s"), side("s")]) for _ in range(n)]
    borrowed = statistics.fmean(half(unpaired(blocks([0.0]), side("s")).estimate(each)) for each in noise)
    expected = stats.t.isf(0.025, 2 * size - 2) * 0.01 * math.sqrt(1 + 1 / size) * c4(2 * size - 1)
    assert borrowed == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("repeats", [3, 5])
def test_of_many_equal_points_seldom_any_is_seen_to_differ(repeats: int) -> None:
    draw = np.random.default_rng(1)
    draws, others, wrong, found = 300, 12, 0, 0
    for _ in range(draws):
        figures = [blocks(list(draw.normal(size=repeats))) for _ in range(others + 1)]
        noise = pooled_noise(figures)
        apart = [difference(each, figures[0]) for each in figures[1:]]
        wrong += any(each.is_seen(noise, others) for each in apart)
        far = {block: value + 5 for block, value in figures[1].items()}
        found += difference(far, figures[0]).is_seen(noise, others)
    assert 0.005 < wrong / draws < 0.07  # 5 %, within three standard errors
    assert found / draws > 0.95
