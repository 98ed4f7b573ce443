"""Rates over the window, and which steps are in it."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.events import Event, Profiled, Step, WindowClosed, WindowOpened
from lora_lab.telemetry.figures import Summary
from lora_lab.telemetry.throughput import add_busy_share, add_kernel_time, rate_error, throughput
from lora_lab.telemetry.window import Window, find_window


@st.composite
def steps(draw: st.DrawFn, least: int = 1) -> tuple[Step, ...]:
    made = []
    for number in range(1, draw(st.integers(least, 12)) + 1):
        real = draw(st.integers(2, 4096))
        made.append(
            Step(
                t=float(number),
                step=number,
                seconds=None if number == 1 else draw(st.floats(1e-3, 10)),
                loss=1.0,
                rows=draw(st.integers(1, 64)),
                slots=real + draw(st.integers(0, 4096)),
                real=real,
                trained=draw(st.integers(1, real - 1)),
                skipped=False,
            )
        )
    return tuple(made)


SECONDS = st.floats(1e-2, 1e4)
RATES = {
    "throughput/tokens_per_second": "real",
    "throughput/slots_per_second": "slots",
    "throughput/trained_tokens_per_second": "trained",
    "throughput/samples_per_second": "rows",
}


@given(inside=steps(), start=st.floats(0, 1e6), seconds=SECONDS)
def test_a_rate_times_the_windows_length_is_the_sum(inside: tuple[Step, ...], start: float, seconds: float) -> None:
    window = Window(start, start + seconds, inside)
    figures = throughput(window)
    for name, field in RATES.items():
        assert figures[name] * window.seconds == pytest.approx(sum(getattr(step, field) for step in inside))
    assert figures["throughput/steps_per_second"] * window.seconds == pytest.approx(len(inside))


@given(inside=steps(), seconds=SECONDS)
def test_the_studys_unit_is_the_inverse(inside: tuple[Step, ...], seconds: float) -> None:
    figures = throughput(Window(0.0, seconds, inside))
    assert figures["throughput/seconds_per_10k_tokens"] * figures["throughput/tokens_per_second"] == pytest.approx(1e4)


@given(inside=steps(least=2), cut=st.integers(1, 11), lengths=st.tuples(SECONDS, SECONDS))
def test_two_windows_end_to_end_weigh_by_their_time(
    inside: tuple[Step, ...], cut: int, lengths: tuple[float, float]
) -> None:
    """A mean of the steps' own rates would not: short steps would weigh as much as long ones."""
    cut = min(cut, len(inside) - 1)
    first = throughput(Window(0.0, lengths[0], inside[:cut]))
    second = throughput(Window(lengths[0], sum(lengths), inside[cut:]))
    both = throughput(Window(0.0, sum(lengths), inside))
    for name in RATES:
        assert both[name] * sum(lengths) == pytest.approx(first[name] * lengths[0] + second[name] * lengths[1])


@given(inside=steps(), seconds=SECONDS)
def test_padding_is_no_work(inside: tuple[Step, ...], seconds: float) -> None:
    figures = throughput(Window(0.0, seconds, inside))
    assert 0 < figures["tokens/trained_share"] <= figures["tokens/real_share"] <= 1
    assert figures["throughput/tokens_per_second"] == pytest.approx(
        figures["throughput/slots_per_second"] * figures["tokens/real_share"]
    )


def test_a_slow_outlier_does_not_move_the_median_step() -> None:
    def step(number: int, seconds: float) -> Step:
        return Step(t=0, step=number, seconds=seconds, loss=1, rows=1, slots=1, real=1, trained=1, skipped=False)

    seconds = [0.1, 0.1, 0.1, 9.0, 0.1]
    window = Window(0.0, 9.4, tuple(step(i, s) for i, s in enumerate(seconds, 1)))
    assert throughput(window)["throughput/step_seconds_p50"] == pytest.approx(0.1)


def said(steps: tuple[Step, ...], warmup: int, last: int) -> list[Event]:
    """The worker's words: each step's loss arrives one step late, the last ones after the window closed."""
    events: list[Event] = []
    for step in steps:
        if step.step == warmup + 1:
            events.append(WindowOpened(t=100.0, after_step=warmup))
        events += [before for before in steps if before.step == step.step - 1]
    return [*events, WindowClosed(t=110.0, after_step=last), steps[-1]]


@given(made=steps(least=2), warmup=st.integers(0, 11))
def test_warm_up_is_outside_and_late_losses_are_inside(made: tuple[Step, ...], warmup: int) -> None:
    warmup = min(warmup, len(made) - 1)
    window = find_window(said(made, warmup, len(made)))
    assert window is not None
    assert [step.step for step in window.steps] == list(range(warmup + 1, len(made) + 1))
    assert (window.start, window.end) == (100.0, 110.0)


@given(made=steps(least=2), data=st.data())
def test_a_window_with_a_step_missing_is_no_window(made: tuple[Step, ...], data: st.DataObject) -> None:
    """A trial that stops between the window's end and its last losses would else look slower than it was."""
    lost = data.draw(st.sampled_from(made))
    events = [event for event in said(made, 0, len(made)) if event is not lost]
    assert find_window(events) is None


def test_half_a_window_is_no_window() -> None:
    step = Step(t=1, step=1, seconds=None, loss=1, rows=1, slots=1, real=1, trained=1, skipped=False)
    opened, closed = WindowOpened(t=1.0, after_step=0), WindowClosed(t=2.0, after_step=1)
    assert find_window([]) is None
    assert find_window([opened, step]) is None
    assert find_window([step, closed]) is None
    assert find_window([opened, step, WindowClosed(t=1.0, after_step=1)]) is None
    assert find_window([opened, step, closed]) is not None


RUNS = 1000
STEPS, TOKENS = 200, 4096


def noisy(chance: random.Random, correlation: float) -> list[Step]:
    """Steps of 0.5 s and 4,096 tokens on average: lengths of rows vary, times too, and follow the tokens in part."""
    made, drift = [], chance.gauss(0, 1)
    for number in range(1, STEPS + 1):
        real = chance.randint(TOKENS // 2, TOKENS + TOKENS // 2)
        drift = correlation * drift + (1 - correlation**2) ** 0.5 * chance.gauss(0, 1)
        seconds = 0.25 + 0.25 * real / TOKENS + 0.03 * drift
        made.append(
            Step(t=0, step=number, seconds=seconds, loss=1, rows=1, slots=real, real=real, trained=1, skipped=False)
        )
    return made


@pytest.mark.parametrize("correlation", [0.0, 0.3])
def test_the_interval_holds_the_true_rate_about_nineteen_times_in_twenty(correlation: float) -> None:
    """Where a step's time hangs together with the one's before, in batches it hardly does."""
    chance = random.Random(1)
    held = 0
    for _ in range(RUNS):
        steps = noisy(chance, correlation)
        rate = sum(step.real for step in steps) / sum(step.seconds or 0.0 for step in steps)
        error = rate_error(steps)
        assert error is not None
        held += abs(rate - TOKENS / 0.5) <= error
    assert 0.92 <= held / RUNS <= 0.98


def test_fewer_than_twenty_steps_or_one_without_a_time_have_no_interval() -> None:
    steps = noisy(random.Random(1), 0.0)
    assert rate_error(steps[:19]) is None
    assert rate_error(steps[:20]) is not None
    untimed = Step(t=0, step=1, seconds=None, loss=1, rows=1, slots=9, real=9, trained=1, skipped=False)
    assert rate_error([untimed, *steps]) is None
    assert "throughput/tokens_per_second_error" not in throughput(Window(0.0, 9.0, tuple(steps[:19])))


def test_equal_steps_have_an_interval_of_nothing() -> None:
    steps = noisy(random.Random(1), 0.0)[:1] * 40
    assert rate_error(steps) == pytest.approx(0.0, abs=1e-6)


KERNELS = ("throughput/kernel_seconds", "throughput/step_to_kernel_ratio")


def profile(slots: int, busy: float, kernels: float | None, steps: int = 2) -> Profiled:
    return Profiled(t=9, steps=steps, slots=slots, kernels=9, busy_seconds=busy, kernel_seconds=kernels)


def of_kernels(window: Window | None, *events: Event) -> Summary:
    summary = Summary()
    add_kernel_time(summary, window, events)
    assert summary.metrics.keys() | summary.absent.keys() == set(KERNELS)
    return summary


def test_kernel_time_is_a_steps_and_the_ratio_goes_by_slots() -> None:
    """Steps of a second with 100 slots; two profiled ones with 200 slots each worked for half a second in all."""
    window = Window(0.0, 4.0, tuple(step_of(1.0, slots=100) for _ in range(4)))
    metrics = of_kernels(window, profile(slots=400, busy=0.4, kernels=0.5)).metrics
    assert metrics == pytest.approx({KERNELS[0]: 0.25, KERNELS[1]: 1.0 / 100 / (0.5 / 400)})


def step_of(seconds: float, slots: int) -> Step:
    return Step(t=1, step=1, seconds=seconds, loss=1, rows=1, slots=slots, real=slots, trained=slots, skipped=False)


@given(seconds=st.floats(0.01, 10), slots=st.integers(1, 10**5), share=st.floats(0.01, 1), more=st.integers(1, 4))
def test_for_equal_steps_without_overlap_the_ratio_is_the_inverse_of_the_busy_share(
    seconds: float, slots: int, share: float, more: int
) -> None:
    window = Window(0.0, 4 * seconds, tuple(step_of(seconds, slots) for _ in range(4)))
    busy = seconds * share * more
    profiled = profile(slots=slots * more, busy=busy, kernels=busy, steps=1)
    summary = of_kernels(window, profiled)
    add_busy_share(summary, window, [profiled])
    assert summary.metrics[KERNELS[1]] == pytest.approx(1 / summary.metrics["throughput/gpu_busy_share"])


@pytest.mark.parametrize(
    ("window", "events", "why"),
    [
        (None, [profile(1, 1.0, 1.0)], "the measured window was not completed"),
        (Window(0.0, 1.0, (step_of(1.0, 1),)), [], "no step was profiled"),
        (Window(0.0, 1.0, (step_of(1.0, 1),)), [profile(1, 1.0, None)], "does not say how long its kernels took"),
    ],
)
def test_kernel_time_that_is_not_known_says_why(window: Window | None, events: list[Event], why: str) -> None:
    assert all(why in reason for reason in of_kernels(window, *events).absent.values())
    assert not of_kernels(window, *events).metrics
