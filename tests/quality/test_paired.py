"""A change of losses on the same rows: its value by tokens, and an interval that holds as often as it says."""

import math

import numpy as np
import pytest

from lora_lab.quality.paired import FEWEST_ROWS, change

TRUE = -0.1
"""Nats per token."""


def test_the_value_is_weighted_by_tokens_and_rows_that_are_lower_are_counted() -> None:
    found = change([30.0, 5.0, 4.0, 1.0], [20.0, 6.0, 5.0, 1.0], [100, 10, 10, 10])
    assert found is not None
    assert found.value == pytest.approx(8 / 130)
    assert found.improved == 0.5
    assert (found.low, found.high, found.is_seen) == (None, None, False), "four rows have no interval"


def test_no_rows_or_no_number_is_no_change() -> None:
    assert change([], [], []) is None
    assert change([math.nan] * 20, [1.0] * 20, [4] * 20) is None


@pytest.mark.parametrize("rows", [FEWEST_ROWS, 32])
def test_the_interval_covers_the_true_change_in_19_of_20_samples(rows: int) -> None:
    """300 samples: the share that is covered scatters by 1.3 %."""
    draw = np.random.default_rng(5)
    covered, widths = 0, []
    for _ in range(300):
        tokens = draw.integers(5, 200, size=rows)
        differences = draw.normal(TRUE, 0.3, size=rows) * tokens
        found = change(differences, np.zeros(rows), tokens)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= TRUE <= found.high
        widths.append(found.high - found.low)
    assert 0.90 <= covered / 300 <= 0.985
    # a mean of equal weights would have 4 x 0.3 / sqrt(rows); weights that differ count as fewer rows
    assert 1.0 < np.mean(widths) * math.sqrt(rows) / (4 * 0.3) < 1.5


def test_the_same_rows_give_the_same_interval() -> None:
    nats = [float(value) for value in np.random.default_rng(1).normal(5, 1, 20)]
    assert change(nats, [6.0] * 20, [10] * 20) == change(nats, [6.0] * 20, [10] * 20)
