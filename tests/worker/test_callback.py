"""What a trial tells from inside a real Trainer on the CPU: the window's edges and times, what a step holds, and steps
that are only profiled."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import some_by_day
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_lab.composition.compose import CONF
from lora_lab.config import MeasureConfig, TrialConfig
from lora_lab.events import Ended, Event, PhaseBegan, Profiled, Step, WindowClosed, WindowOpened
from lora_lab.method_config import OptimizerConfig, PrecisionConfig
from lora_lab.options import Batching, DataSource, DType, ModelSource, Weights
from lora_lab.phase import Phase
from lora_lab.worker.callback import TelemetryCallback
from lora_lab.worker.data import Collator, Example, pack, train_collator
from lora_lab.worker.models import load_architecture, load_model
from lora_lab.worker.phases import PhaseClock
from lora_lab.worker.profiling import StepProfiler, busy_of_steps, covered
from lora_lab.worker.training import make_trainer
from lora_lab.worker.trial import run_trial

pytestmark = [
    # peft 0.21 still asks transformers 5.23 by the older name
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # transformers 5.23 has a newer name for the setting, 5.17 has not
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
]

CPU = torch.device("cpu")
PAD, WIDTH = 258, 32
LENGTHS = (5, 9, 12, 20)
"""Of the rows; as many as make one step."""
RATE = 0.01


def config_of(
    batching: Batching = Batching.longest, *, warmup_steps: int = 1, steps: int = 3, **more: Any
) -> TrialConfig:
    config = TrialConfig(
        optimizer=more.pop("optimizer", OptimizerConfig(optim="adamw_torch")),
        precision=PrecisionConfig(dtype=DType.fp32),
        measure=MeasureConfig(warmup_steps=warmup_steps, steps=steps, eval_rows=2),
        seq_len=WIDTH,
        learning_rate=RATE,
        **more,
    )
    config.data.batching = batching
    config.model.source, config.model.weights = ModelSource.tiny, Weights.random
    config.model.architecture = yaml.safe_load((CONF / "model/tiny.yaml").read_text())["architecture"]
    return config


def row(length: int) -> Example:
    """Its first three tokens are the prompt."""
    ids = [(7 * length + n) % PAD for n in range(length)]
    return Example(ids, [-100] * 3 + ids[3:])


ROWS = [row(length) for length in LENGTHS]


class Slowly(Collator):
    """Takes its time over a batch."""

    seconds = 0.08

    def __call__(self, examples: Any) -> Any:
        time.sleep(self.seconds)
        return super().__call__(examples)


@dataclass
class Training:
    """A tiny model in a real Trainer, watched by the callback."""

    config: TrialConfig
    rows: list[Example] = field(default_factory=lambda: ROWS)
    slow_data: bool = False
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = load_model(self.config, load_architecture(self.config.model), CPU)
        clock = PhaseClock(self.events.append)
        self.callback = TelemetryCallback(self.config.measure, CPU, self.events.append, clock)
        self.callback.watch(self.model)
        collator = train_collator(self.config, PAD)
        if self.slow_data:
            collator = Slowly(collator.pad_id, collator.widths, collator.packed)
        self.trainer = make_trainer(self.config, self.model, self.rows, collator, [self.callback], "unused", CPU)

    def run(self) -> "Training":
        self.model.train()
        self.trainer.train()
        return self

    @property
    def steps(self) -> list[Step]:
        return [event for event in self.events if isinstance(event, Step)]

    def edges(self) -> tuple[WindowOpened, WindowClosed]:
        [opened] = [event for event in self.events if isinstance(event, WindowOpened)]
        [closed] = [event for event in self.events if isinstance(event, WindowClosed)]
        return opened, closed

    def adapters(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters() if p.requires_grad]


@pytest.mark.parametrize("warmup_steps", some_by_day([0, 2], by_day=[2]))
def test_the_windows_step_times_add_up_to_its_length(warmup_steps: int) -> None:
    training = Training(config_of(warmup_steps=warmup_steps, steps=4)).run()
    opened, closed = training.edges()
    assert (opened.after_step, closed.after_step) == (warmup_steps, warmup_steps + 4)
    inside = [step for step in training.steps if step.step > warmup_steps]
    assert [step.step for step in training.steps] == list(range(1, warmup_steps + 5))
    times = [step.seconds for step in inside]
    assert sum(seconds or 0.0 for seconds in times) == pytest.approx(closed.t - opened.t, abs=0.05)
    for (before, after), seconds in zip(pairwise([opened.t, *(step.t for step in inside)]), times, strict=True):
        assert seconds == pytest.approx(after - before, abs=0.03)


def test_what_comes_between_warm_up_and_window_is_in_no_step_of_the_window() -> None:
    """The read-back, for one, which lasts as long as a step of a small model."""
    training = Training(config_of())
    training.callback.on_stepped = lambda: time.sleep(1.0)
    training.run()
    opened, closed = training.edges()
    assert sum(step.seconds or 0.0 for step in training.steps[1:]) == pytest.approx(closed.t - opened.t, abs=0.5)
    assert training.steps[1].seconds is not None
    assert training.steps[1].seconds < 1.0
    assert training.steps[1].waited_seconds < 1.0


LAYOUTS = [
    # batching, (rows, slots, sum of squares of rows' slots) by hand
    (Batching.longest, 4, 4 * 20, 4 * 20**2),
    (Batching.seq_len, 4, 4 * WIDTH, 4 * WIDTH**2),
    (Batching.packed, 2, 2 * WIDTH, 2 * WIDTH**2),  # 5 + 9 + 12 and 20 tokens
]


@pytest.mark.parametrize("micro_batches", some_by_day([1, 2], by_day=[2]))
@pytest.mark.parametrize(
    ("batching", "rows", "slots", "squares"), LAYOUTS, ids=lambda value: getattr(value, "name", "")
)
def test_a_step_counts_what_it_holds(
    batching: Batching, rows: int, slots: int, squares: int, micro_batches: int
) -> None:
    if batching is Batching.longest and micro_batches == 2:
        pytest.skip("which rows share a width is up to the order of rows")
    examples = pack(ROWS, WIDTH) if batching is Batching.packed else ROWS
    config = config_of(batching, batch_size=rows // micro_batches, grad_accum_steps=micro_batches)
    steps = Training(config, examples).run().steps
    assert len(steps) == 4
    for step in steps:
        assert (step.rows, step.slots, step.attended_slots) == (rows, slots, squares)
        assert step.real == sum(LENGTHS)
        assert step.trained == sum(length - 3 for length in LENGTHS)
        assert step.attended == sum(length**2 for length in LENGTHS), "attention ends at the end of a document"


def test_waiting_for_data_is_told_from_work() -> None:
    config = config_of(batch_size=2, grad_accum_steps=2)  # an epoch is a step
    waited = [step.waited_seconds for step in Training(config, ROWS * 8, slow_data=True).run().steps]
    quick = Training(config, ROWS * 8)
    quick.model.register_forward_pre_hook(lambda *_: time.sleep(Slowly.seconds))
    not_waited = [step.waited_seconds for step in quick.run().steps]
    two_batches = 2 * Slowly.seconds
    assert all(two_batches <= seconds for seconds in waited[1:]), waited
    assert statistics.median(not_waited[1:]) < two_batches, not_waited
    for step in quick.steps[1:]:
        assert step.seconds is not None
        assert step.seconds > two_batches


@pytest.mark.nightly
def test_without_a_warm_up_the_first_step_has_waited_since_the_window_opened_and_no_longer() -> None:
    """The callback is made before the held-out loss is taken, which may last minutes."""
    training = Training(config_of(warmup_steps=0))
    time.sleep(0.5)
    first = training.run().steps[0]
    assert first.seconds is not None
    assert first.waited_seconds <= first.seconds


# --- steps that are only profiled


class Watching:
    """Stands for the profiler of a GPU's steps: looks at weights and rates when a step is over."""

    def __init__(self, training: Training, steps: int) -> None:
        self.steps = steps
        self.fault = ""
        self._training = training
        self.slots: list[int] = []
        self.weights: list[list[Tensor]] = []
        self.began_after = 0

    def start(self) -> None:
        self.began_after = self._training.trainer.state.global_step
        self.weights.append(self._training.adapters())

    def stepped(self, slots: int) -> None:
        self.slots.append(slots)
        self.weights.append(self._training.adapters())


def optimizers() -> dict[str, OptimizerConfig]:
    found = {path.stem: OptimizerConfig(**yaml.safe_load(path.read_text())) for path in CONF.glob("optimizer/*.yaml")}
    momentum = OptimizerConfig(target="torch.optim.SGD", args={"momentum": 0.9, "weight_decay": 0.1})
    return found | {"a user's own": momentum, "decayed": OptimizerConfig(optim="adamw_torch", weight_decay=0.1)}


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("name", some_by_day(optimizers(), by_day=["paged_adamw", "a user's own"]))
def test_steps_that_are_only_profiled_leave_the_weights_as_they_are(name: str) -> None:
    training = Training(config_of(optimizer=optimizers()[name], batch_size=4))
    watching = Watching(training, steps=3)
    training.callback._profiler = watching  # type: ignore[assignment]
    training.trainer.args.max_steps += watching.steps  # as make_trainer does on a GPU
    measured: list[list[Tensor]] = [training.adapters()]
    rates: list[float] = []

    def note() -> None:
        rates.append(training.trainer.optimizer.param_groups[0]["lr"])
        measured.append(training.adapters())

    _after_each_measured_step(training.callback, note)
    training.run()
    assert rates == [RATE] * 4
    assert not any(same(before, after) for before, after in pairwise(measured)), "a measured step that changed nothing"
    assert watching.began_after == 4
    assert len(watching.weights) == 1 + watching.steps
    assert same(watching.weights[0], measured[-1])
    assert all(same(watching.weights[0], after) for after in watching.weights[1:])
    assert watching.slots == [training.steps[0].slots] * watching.steps
    assert len(training.steps) == 4, "a profiled step is no step of the trial"
    assert training.events[-1] == PhaseBegan(t=training.events[-1].t, phase=Phase.profile.value)


def _after_each_measured_step(callback: TelemetryCallback, note: Callable[[], None]) -> None:
    push = callback._relay.push

    def pushed(*arguments: Any) -> None:
        push(*arguments)
        note()

    callback._relay.push = pushed  # type: ignore[method-assign]


def test_on_a_cpu_nothing_is_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = config_of(share_device=True)
    config.measure.profile_steps = 3
    config.data.source, config.data.rows = DataSource.random_tokens, 16
    told: list[Event] = []
    run_trial(config, tmp_path, told.append)
    [ended] = [event for event in told if isinstance(event, Ended)]
    assert ended.outcome == "finished", ended.traceback
    assert not [event for event in told if isinstance(event, Profiled)]
    phases = [event.phase for event in told if isinstance(event, PhaseBegan)]
    assert phases[-4:] == [phase.value for phase in (Phase.warm_up, Phase.window, Phase.evaluation_after, Phase.saving)]
    assert [event.step for event in told if isinstance(event, Step)] == [1, 2, 3, 4]


# --- how long a GPU was at work


@pytest.mark.parametrize(
    ("spans", "length"),
    [
        ([], 0.0),
        ([(1.0, 3.0)], 2.0),
        ([(1.0, 3.0), (5.0, 6.0)], 3.0),
        ([(5.0, 6.0), (1.0, 3.0)], 3.0),
        ([(1.0, 3.0), (2.0, 6.0)], 5.0),
        ([(1.0, 9.0), (2.0, 3.0), (4.0, 5.0)], 8.0),
        ([(1.0, 9.0), (2.0, 3.0), (8.0, 10.0)], 9.0),
        ([(1.0, 2.0), (2.0, 3.0)], 2.0),
        ([(1.0, 1.0), (4.0, 4.0)], 0.0),
        ([(-5.0, -3.0)], 2.0),
    ],
)
def test_time_that_several_kernels_share_counts_once(spans: list[tuple[float, float]], length: float) -> None:
    assert covered(spans) == length


SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)).map(lambda s: (s[0], s[0] + s[1])), max_size=20)


@given(spans=SPANS)
def test_what_is_covered_is_what_a_count_of_every_instant_says(spans: list[tuple[int, int]]) -> None:
    assert covered(spans) == len({instant for start, stop in spans for instant in range(start, stop)})


@pytest.mark.parametrize(
    ("spans", "ends", "seconds"),
    [
        ([(1.0, 3.0), (2.0, 4.0), (7.0, 8.0)], [5.0, 9.0], [3e-6, 1e-6]),
        ([(7.0, 8.0), (1.0, 3.0)], [3.0, 8.0], [2e-6, 1e-6]),
        ([(1.0, 6.0), (7.0, 8.0)], [5.0, 9.0], []),
        ([(1.0, 3.0), (7.0, 8.0), (9.0, 10.0)], [5.0, 9.0], []),
        ([(1.0, 3.0)], [5.0, 9.0], []),
        ([], [5.0], []),
    ],
    ids=["overlap", "unordered", "crosses an end", "after the last", "a step without", "none"],
)
def test_each_profiled_step_has_its_own_busy_time_or_none_has(
    spans: list[tuple[float, float]], ends: list[float], seconds: list[float]
) -> None:
    assert busy_of_steps(spans, ends) == pytest.approx(seconds)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("where", ["start", "stop"])
def test_a_profiler_that_fails_costs_its_own_figure_alone(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("CUPTI is not there")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.profiler.profile, "start", lambda _: None)
    monkeypatch.setattr(torch.profiler.profile, where, fails)
    profiler = StepProfiler(2)
    profiler.start()
    assert [profiler.stepped(8), profiler.stepped(8)] == [None, None]
    assert profiler.fault == "CUPTI is not there"
