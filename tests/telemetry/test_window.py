"""Parts of a window, and a window without its slow start."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import CONSTANT, ROUNDING, SyntheticCard, squares, step, synthetic_cards

from lora_lab.events import Step, WindowClosed, WindowOpened
from lora_lab.telemetry.energy import window_energy
from lora_lab.telemetry.throughput import throughput
from lora_lab.telemetry.window import Window, find_window, steady

LENGTHS = st.lists(st.floats(0.05, 2.0), min_size=1, max_size=30)


def steps_of(seconds: list[float], real: int = 1000) -> tuple[Step, ...]:
    return tuple(step(number, each, real) for number, each in enumerate(seconds, 1))


@given(start=st.floats(0, 1e5), lengths=LENGTHS, cuts=st.lists(st.integers(0, 30), max_size=4), late=st.floats(0, 0.02))
def test_parts_end_to_end_are_the_whole_window(
    start: float, lengths: list[float], cuts: list[int], late: float
) -> None:
    """Seconds, steps and tokens; the last part takes what the host's clock says beyond the device's."""
    whole = Window(start, start + sum(lengths) + late, steps_of(lengths))
    places = sorted({0, len(lengths), *(cut for cut in cuts if cut < len(lengths))})
    parts = [whole.part(a, b - a) for a, b in pairwise(places)]
    assert [each for part in parts for each in part.steps] == list(whole.steps)
    assert (parts[0].start, parts[-1].end) == (whole.start, whole.end)
    assert all(before.end == pytest.approx(after.start) for before, after in pairwise(parts))
    assert sum(part.seconds for part in parts) == pytest.approx(whole.seconds)
    tokens = sum(throughput(part)["throughput/tokens_per_second"] * part.seconds for part in parts)
    assert tokens == pytest.approx(throughput(whole)["throughput/tokens_per_second"] * whole.seconds)


STEP_SECONDS, STEPS = 0.25, 240


@given(card=synthetic_cards(CONSTANT | squares(0.01, 0.24)), cuts=st.sets(st.integers(20, 220), max_size=5))
def test_the_energies_of_parts_add_up_to_the_windows(card: SyntheticCard, cuts: set[int]) -> None:
    whole = Window(2.0, 2.0 + STEPS * STEP_SECONDS, steps_of([STEP_SECONDS] * STEPS))
    samples = card.samples(whole.end + 1)
    places = sorted({0, STEPS, *cuts})
    spans = [whole.part(a, b - a) for a, b in pairwise(places)]
    found = [window_energy(part.start, part.end, samples) for part in spans]
    if all(energy.source == "counter" for energy in found):
        total = window_energy(whole.start, whole.end, samples).joules
        assert sum(energy.joules or 0.0 for energy in found) == pytest.approx(total, rel=1e-9)


@pytest.mark.nightly
@given(card=synthetic_cards(CONSTANT | squares(0.01, 0.24)), first=st.integers(0, STEPS - 20))
def test_five_seconds_of_a_long_steady_run_cost_as_much_a_token_as_all_of_it_within_the_errors(
    card: SyntheticCard, first: int
) -> None:
    whole = Window(2.0, 2.0 + STEPS * STEP_SECONDS, steps_of([STEP_SECONDS] * STEPS))
    part = whole.part(first, 20)
    assert part.seconds == pytest.approx(5.0)
    samples = card.samples(whole.end + 1)
    per_token, errors = [], []
    for window in (part, whole):
        energy = window_energy(window.start, window.end, samples)
        assert energy.joules is not None, energy.reason
        tokens = sum(each.real for each in window.steps)
        per_token.append(energy.joules / tokens)
        errors.append(((energy.error_joules or 0.0) + ROUNDING) / tokens)
    # of a wave that does not end with the part, what it holds differs truly, by one period at most
    period = getattr(card.power, "period", 0.0) * card.power.highest / (20 * 1000)
    assert abs(per_token[0] - per_token[1]) <= sum(errors) + period


def test_a_part_whose_edge_no_clock_knows_is_refused() -> None:
    untimed = Step(t=0, step=1, seconds=None, loss=1, rows=1, slots=1, real=1, trained=1, skipped=False)
    with pytest.raises(ValueError, match="no time"):
        Window(0.0, 2.0, (untimed, step(2, 1.0))).part(1, 1)


@given(slow=st.lists(st.floats(2.5, 60), max_size=3), usual=st.lists(st.floats(0.8, 1.2), min_size=9, max_size=20))
def test_slow_steps_at_the_start_are_left_out_with_their_time_and_no_others(
    slow: list[float], usual: list[float]
) -> None:
    window = Window(5.0, 5.0 + sum(slow) + sum(usual), steps_of([*slow, *usual]))
    kept = steady(window)
    assert [each.seconds for each in kept.steps] == usual
    assert kept.start == pytest.approx(5.0 + sum(slow))
    assert kept.end == window.end
    later = Window(5.0, 5.0 + sum(slow) + sum(usual), steps_of([*usual, *slow]))
    assert steady(later) == later, "a slow step further on is part of what is measured"


def test_a_trials_windows_are_found_by_their_names() -> None:
    def edges(name: str, start: float, after: int, last: int) -> tuple[WindowOpened, WindowClosed]:
        opened = WindowOpened(t=start, after_step=after, name=name)
        return opened, WindowClosed(t=start + 9.0, after_step=last, name=name)

    events = [*edges("inference", 0.0, 0, 2), *edges("train", 10.0, 2, 5), *steps_of([1.0] * 5)]
    train, other = find_window(events), find_window(events, "inference")
    assert train is not None
    assert other is not None
    assert ([each.step for each in train.steps], train.start) == ([3, 4, 5], 10.0)
    assert ([each.step for each in other.steps], other.start) == ([1, 2], 0.0)
    assert find_window(events, "another") is None
