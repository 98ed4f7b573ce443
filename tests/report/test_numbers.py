"""How estimates are written."""

import math

import pytest

from lora_lab.report.measures import LOSS, THROUGHPUT
from lora_lab.report.statistics.estimates import Estimate
from lora_lab.report.writing.numbers import TOO_NOISY, format_estimate


def ratios(value: float, low: float, high: float) -> Estimate:
    return Estimate(value=math.log(value), low=math.log(low), high=math.log(high), detectable=math.log(high))


@pytest.mark.parametrize(
    ("estimate", "is_too_noisy"),
    [
        (ratios(3.0, 2.3e-6, 4.3e6), True),
        (ratios(1.0, 0.09, 2.0), True),
        (ratios(1.0, 0.5, 11.0), True),
        (ratios(1.0, 0.11, 9.0), False),
        (ratios(15.0, 14.0, 16.0), False),
        (ratios(15.0, 1.2, 190.0), True),
    ],
)
def test_an_interval_beyond_a_factor_of_ten_asks_for_less_noise(estimate: Estimate, is_too_noisy: bool) -> None:
    assert (format_estimate(estimate, THROUGHPUT) == TOO_NOISY) is is_too_noisy


def test_differences_that_are_not_ratios_are_always_written() -> None:
    assert "nats" in format_estimate(Estimate(value=0.0, low=-5.0, high=5.0, detectable=7.0), LOSS)
