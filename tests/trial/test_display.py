"""What a user sees while a trial runs: lines in a log file, and a bar on a terminal."""

import io
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from rich.console import Console
from synthetic import job_of

from lora_lab.config import MeasureConfig, TrainConfig, TrialConfig
from lora_lab.events import DataCounted, Evaluated, Event, PhaseBegan, Progress, Step, Warned
from lora_lab.job_events import Resumed, Spiked
from lora_lab.phase import Phase
from lora_lab.telemetry.sampler import Sample, Sampler
from lora_lab.trial import display as module
from lora_lab.trial.display import Display
from lora_lab.trial.job_progress import JobProgress

JOB = TrialConfig(train=TrainConfig(epochs=2), measure=MeasureConfig(price_per_kwh=0.5))
CLOCK = r"\d\d:\d\d:\d\d"


class Screen:
    """A display that writes into a text, at times of the test's own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, config: TrialConfig, terminal: bool) -> None:
        self.out = io.StringIO()
        self.now = 0.0
        console = Console(file=self.out, force_terminal=terminal, width=120, color_system=None, legacy_windows=False)
        monkeypatch.setattr(module, "Console", lambda **_: console)
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        self.sampler = Sampler(None)
        self.display = Display("a trial", config, self.sampler)

    def show(self, events: Sequence[Event]) -> list[str]:
        """The lines that these events make, each shown when it happened."""
        before = len(self.out.getvalue())
        with self.display:
            for event in events:
                self.now = event.t
                self.display.show(event)
        return self.out.getvalue()[before:].splitlines()


def test_a_log_of_a_job_has_a_line_for_each_evaluation_and_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Screen(monkeypatch, JOB, terminal=False).show(list(job_of(40)))[1:]
    assert [("held-out" in line, "checkpoint" in line) for line in lines] == [(True, False), (False, True)] * 4
    assert all(re.match(rf"  {CLOCK} ", line) for line in lines)
    assert "after step 20" in lines[2]
    assert "epoch 1.00" in lines[2]
    assert "lowest so far" in lines[2]
    assert "checkpoints/000020" in lines[3]


def test_a_log_of_a_job_has_a_line_a_minute_at_most_which_says_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, JOB, terminal=False)
    screen.sampler.samples += [Sample(t=t, energy_joules=360.0 * t, average_watts=360.0) for t in range(2000)]
    lines = screen.show(list(job_of(2000, seconds=0.9, every=10**6)))[1:]
    assert 25 <= len(lines) <= 30, "the job takes half an hour"
    middle = lines[len(lines) // 2]
    for figure in (r"step 1,\d+/2,000", r"epoch \d\.\d\d/2", r"loss 2\.\d", "held-out 3.0000", r"1,111 tokens/s"):
        assert re.search(figure, middle), middle
    for figure in (r"360 W", r"min left", r"0\.\d\d\d kWh", r"cost 0\.\d\d"):
        assert re.search(figure, middle), middle


def test_what_is_out_of_the_ordinary_stands_out_of_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    events = list(job_of(40))
    spiked = Spiked(t=4.0, step=35, reason="loss rose", action="lower_lr", learning_rate=5e-5, rows=[*range(20)])
    resumed = Resumed(t=4.1, step=30, folder="checkpoints/000030")
    lines = Screen(monkeypatch, JOB, terminal=False).show([*events, spiked, resumed, Warned(t=5.0, text="a warning")])
    spike, goes_on, warning = lines[-3:]
    assert re.match(rf"spike: {CLOCK} .*step 35.*5e-05", spike)
    assert re.match(rf"resumed: {CLOCK} .*step 30.*checkpoints/000030", goes_on)
    assert re.match(rf"warning: {CLOCK} a warning", warning)


def test_a_job_that_goes_on_calls_no_loss_the_lowest_of_attempts_that_it_has_not_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, *rest = job_of(40)
    again = Screen(monkeypatch, JOB, terminal=False).show(
        [begun, Resumed(t=begun.t, step=5, folder="checkpoints/000005"), *rest]
    )
    first = Screen(monkeypatch, JOB, terminal=False).show([begun, *rest])
    for lines, since in ((again, "since it went on"), (first, "so far")):
        said = [line for line in lines if "held-out loss" in line]
        assert said
        assert all(f"lowest {since}" in line for line in said), said


def test_a_window_trial_has_the_lines_that_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = PhaseBegan(t=0.0, phase=Phase.window.value)
    steps = [event for event in job_of(30) if isinstance(event, Step)]
    lines = Screen(monkeypatch, TrialConfig(), terminal=False).show(
        [begun, *(replace(s, t=6.0 * s.step) for s in steps)]
    )
    assert len(lines) == 32
    assert re.fullmatch(r"  measured window: step 30/35  loss 2\.000  10,000 tokens/s  0 s left", lines[-1])


def test_a_long_reading_of_rows_says_how_fast_it_is_and_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = PhaseBegan(t=0.0, phase=Phase.data.value)
    read = [Progress(t=float(t), done=10_000 * t, total=0) for t in range(1, 21)]
    made = [Progress(t=float(t), done=1000 * (t - 20), total=600_000) for t in range(21, 401)]
    lines = Screen(monkeypatch, TrialConfig(), terminal=False).show([begun, *read, *made])
    assert 50 <= len(lines) <= 90, "a line every few seconds"
    assert re.search(r"rows: 60,000 rows read  10,000 rows/s$", "\n".join(lines), re.MULTILINE)
    assert re.search(r"rows: 3\d\d,000 of 600,000 rows  1,000 rows/s  4 min left$", lines[-1])


@pytest.mark.parametrize("terminal", [False, True])
def test_tokens_that_came_from_the_cache_are_said_to(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    counts = dict.fromkeys(("rows_read", "rows_train", "rows_heldout", "rows_truncated", "rows_without_labels"), 9)
    event = DataCounted(t=1.0, real=9, trained=9, digest="", **counts)
    for from_cache in (True, False, None):
        counted = replace(event, from_cache=from_cache)
        phases = [PhaseBegan(t=0.0, phase=phase.value) for phase in (Phase.data, Phase.screening)]
        shown = Screen(monkeypatch, TrialConfig(), terminal).show([phases[0], counted, phases[1], counted])
        said = [line for line in shown if "came from the cache" in line]
        assert len(said) == (1 if from_cache else 0), shown


def test_on_a_terminal_a_job_has_one_bar_and_its_figures_below(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, JOB, terminal=True)
    with screen.display:
        events = [*job_of(40)][:-20]
        for event in events:
            screen.now = event.t
            screen.display.show(event)
            rows = "".join(
                part.text for part in screen.display._bar.console.render(screen.display._bar.get_renderable())
            )
            if isinstance(event, Step) and event.step > 20:
                bar, figures = rows.splitlines()[:2]
                assert f"step {event.step}/40" in bar
                assert "left" in bar
                assert "held-out 2.5000" in figures
    lines = [line for line in screen.out.getvalue().splitlines() if re.search(rf"{CLOCK} \w", line)]
    assert sum("held-out loss" in line for line in lines) == sum(isinstance(e, Evaluated) for e in events[1:])
    assert not any("checkpoint" in line for line in lines)


def progress_after(events: Sequence[Event], samples: Sequence[Sample] = ()) -> JobProgress:
    progress = JobProgress(list(samples), None)
    for event in events:
        progress.see(event)
    return progress


@pytest.mark.parametrize("between", [0.0, 0.5, 5.0])
def test_the_time_left_counts_evaluations_and_checkpoints_by_their_share_so_far(between: float) -> None:
    events = list(job_of(100, seconds=0.1, every=10, between=between))
    half = next(n for n, event in enumerate(events) if isinstance(event, Step) and event.step == 51)
    progress = progress_after(events[:half])
    assert progress.seconds_left == pytest.approx(50 * 0.1 + 5 * between, rel=0.02)


def test_the_time_left_is_not_known_before_a_step_and_grows_when_a_job_goes_back() -> None:
    events = list(job_of(100))
    assert progress_after(events[:4]).left == ""
    progress = progress_after(events)
    assert progress.seconds_left == 0
    progress.see(Resumed(t=20.0, step=50, folder=""))
    progress.see(replace(next(e for e in events if isinstance(e, Step)), step=51, t=21.0))
    assert progress.seconds_left is not None
    assert progress.seconds_left >= 4.9


@pytest.mark.parametrize(
    ("readings", "joules"),
    [
        ([{"energy_joules": 5.0 + 100 * n} for n in range(11)], 1000),
        ([{"average_watts": 100.0} for _ in range(11)], 1000),
        ([{"energy_joules": 100.0 * (n if n < 6 else n - 5.5)} for n in range(11)], 950),
        ([{} for _ in range(11)], None),
    ],
    ids=["counter", "power", "counter that began again", "no sensor"],
)
def test_what_was_drawn_is_counted_from_the_first_step(readings: list[dict[str, float]], joules: float | None) -> None:
    samples = [Sample(t=10.0 + n, **each) for n, each in enumerate(readings)]
    early = Sample(t=2.0, energy_joules=-1e6, average_watts=1e6)
    progress = progress_after(list(job_of(40, begun=10.0)), [early, *samples])
    seen = progress._drawn.joules
    assert seen == (None if joules is None else pytest.approx(joules, rel=0.06))
