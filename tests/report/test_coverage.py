"""How often intervals hold the truth, and how wide they are: a small simulation, and the stored large one."""

import pytest

from benchmarks import simulated
from benchmarks.coverage import stored


@pytest.mark.parametrize("block_sd", [0.0, 0.4])
def test_a_small_simulation_agrees_with_what_is_claimed(block_sd: float) -> None:
    found = simulated.averages(4, 5, block_sd, draws=1000, seed=3)
    assert 0.93 < found["over_blocks"] < 0.97  # 95 %, and three standard deviations of 1,000 draws
    assert found["over_blocks"] <= found["sessions_like_it"] < 0.99
    assert 0.9 < found["width_over_blocks"] < 1.1
    assert 0.9 < found["width_sessions_like_it"] < 1.1
    assert (0.93 if block_sd == 0 else 0.88) < found["this_session"] < (0.97 if block_sd == 0 else 0.94)


@pytest.mark.nightly
def test_over_hosts_the_mean_holds_where_one_session_does_not() -> None:
    found = simulated.hosts(5, host_sd=2.0, draws=250, seed=3)
    assert 0.91 < found["pooled"] < 0.99
    assert 0.9 < found["width_pooled"] < 1.1
    assert 0.67 < found["one_session"] < 0.85


def test_a_short_windows_error_holds_where_steps_are_independent_and_not_where_they_are_alike() -> None:
    assert 0.92 < simulated.windows(30, 0.0, draws=800)["coverage"] < 0.97
    assert 0.62 < simulated.windows(30, 0.8, draws=800)["coverage"] < 0.77


def test_the_stored_coverage_is_within_a_point_and_the_width_within_a_tenth() -> None:
    for row in stored()["averages"]:
        assert abs(row["over_blocks"] - 0.95) < 0.01, row
        assert 0.94 < row["sessions_like_it"] < 0.995, row
        assert abs(row["width_over_blocks"] - 1) < 0.1, row
        assert abs(row["width_sessions_like_it"] - 1) < 0.1, row
