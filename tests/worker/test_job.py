"""A job from the worker's side: its curve, kills at any moment, checkpoints, the best adapter and spikes."""

import errno
import gc
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import some_by_day
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_trials import ended, tiny_config

from lora_lab.config import TrialConfig
from lora_lab.events import (
    Ended,
    EngineDone,
    Evaluated,
    Event,
    OptimizerMemory,
    PhaseBegan,
    Step,
    Warned,
    WindowClosed,
    WindowOpened,
)
from lora_lab.events import Ran as RanFacts
from lora_lab.job_events import Checkpointed, JobPlanned, Resumed, Spiked
from lora_lab.options import Checkpointing, DataSource, DType, EngineKind, OnSpike, Quantization, Schedule
from lora_lab.phase import Phase
from lora_lab.worker.check import checked_examples
from lora_lab.worker.checkpoints import Checkpoints, is_disk_fault
from lora_lab.worker.data import Collator
from lora_lab.worker.job_callback import JobTelemetry
from lora_lab.worker.job_plan import plan_job
from lora_lab.worker.models import load_architecture
from lora_lab.worker.stages.job import rows_of_step
from lora_lab.worker.trainables.lora import Lora
from lora_lab.worker.trial import run_trial

pytestmark = [
    # peft 0.21 still asks transformers 5.23 by the older name
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # transformers 5.23 has a newer name for the setting, 5.17 has not
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning"),
]

STEPS, RATE = 18, 0.01
"""Of a job of two epochs; it evaluates and saves after these."""
EDGES = [5, 9, 14, 18]


def job_config(**method: Any) -> TrialConfig:
    """Two epochs of nine steps, each with an evaluation and a checkpoint near its middle and at its end."""
    config = tiny_config(**method)
    config.data.rows, config.data.holdout, config.batch_size = 24, 0.25, 2
    config.train.epochs, config.learning_rate = 2.0, RATE
    return config


class Killed(BaseException):
    """Ends the worker as a kill would: nothing of it catches this."""


@dataclass
class Ran:
    """One attempt at a job, as its events report it."""

    folder: Path
    events: list[Event]

    def of(self, *kinds: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kinds)]

    @property
    def curve(self) -> dict[int, tuple[float, float]]:
        """Loss and learning rate by step; a step that was repeated counts as it was last."""
        return {step.step: (step.loss, step.learning_rate) for step in self.of(Step)}

    @property
    def heldout(self) -> dict[int | str, float]:
        return {e.phase if e.step is None else e.step: e.loss for e in self.of(Evaluated)}

    @property
    def saved(self) -> list[int]:
        return [saved.step for saved in self.of(Checkpointed)]

    @property
    def kept(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())

    @property
    def warnings(self) -> list[str]:
        return [warned.text for warned in self.of(Warned)]

    def adapter(self, below: str = "adapter") -> dict[str, torch.Tensor]:
        return load_file(self.folder / below / "adapter_model.safetensors")


def run(config: TrialConfig, folder: Path, until: Callable[[Event], bool] = lambda _: False) -> Ran:
    """Run a job in `folder` until it ends, or is killed by an event."""
    ran = Ran(folder, [])

    def emit(event: Event) -> None:
        ran.events.append(event)
        if until(event):
            raise Killed

    try:
        run_trial(config, folder, emit)
    except Killed:
        pass
    else:
        assert isinstance(ran.events[-1], Ended)
    return ran


def resume(config: TrialConfig, folder: Path) -> Ran:
    config.resume = True
    ran = run(config, folder)
    assert ended(ran.events) == ("finished", "")
    return ran


def at_step(step: int) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, Step) and event.step == step


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """A second thread only waits in a model this small; and accelerate collects garbage before each training, among
    everything that the tests have imported."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"dropout": 0.2},
    "qlora": {"dropout": 0.1, "quantization": Quantization.nf4},
}


@pytest.fixture(scope="module")
def unbroken(quick: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """A job of each method that nothing happens to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return {name: run(job_config(**METHODS[name]), tmp_path_factory.mktemp(name)) for name in METHODS}


def test_a_job_trains_to_its_end_in_windows_between_its_evaluations_and_checkpoints(unbroken: dict[str, Ran]) -> None:
    ran = unbroken["lora"]
    assert ended(ran.events) == ("finished", "")
    [planned] = ran.of(JobPlanned)
    assert (planned.steps, planned.steps_per_epoch) == (STEPS, STEPS // 2)
    assert list(ran.curve) == list(range(1, STEPS + 1))
    assert ran.saved == EDGES
    assert ran.kept == ["000014", "000018"], "the newest two are kept"
    assert [e for e in ran.heldout if isinstance(e, int)] == EDGES
    edges = [(event.after_step, type(event)) for event in ran.of(WindowOpened, WindowClosed)]
    starts = [1, *EDGES[:-1]]  # the first step is the warm-up
    assert edges == [
        edge for s, e in zip(starts, EDGES, strict=True) for edge in ((s, WindowOpened), (e, WindowClosed))
    ]
    phases = [event.phase for event in ran.of(PhaseBegan)]
    at = phases.index(Phase.warm_up.value) + 1
    stretch = [Phase.window.value, Phase.evaluation.value, Phase.checkpoint.value]
    assert phases[at:] == [*stretch * len(EDGES), Phase.evaluation_after.value, Phase.saving.value]


@pytest.mark.parametrize("eval_rows", [0, 2])
def test_without_checkpoints_a_job_is_the_same_and_leaves_none(
    unbroken: dict[str, Ran], tmp_path: Path, eval_rows: int
) -> None:
    config = job_config(**METHODS["lora"])
    config.train.keep_checkpoints, config.train.keep_best, config.measure.eval_rows = 0, False, eval_rows
    ran = run(config, tmp_path)
    assert ended(ran.events) == ("finished", "")
    assert ran.curve == unbroken["lora"].curve
    assert ran.saved == []
    assert not list(tmp_path.glob("checkpoints/*"))
    opened, closed = ran.of(WindowOpened), ran.of(WindowClosed)
    assert closed[-1].after_step == STEPS, "the last window is closed, whatever follows"
    assert len(opened) == len(closed) == (len(EDGES) if eval_rows else 1)
    assert [each for each in ran.heldout if isinstance(each, int)] == (EDGES if eval_rows else [])
    assert ran.adapter()


def test_no_second_of_an_evaluation_or_checkpoint_lies_in_a_window_or_a_step(unbroken: dict[str, Ran]) -> None:
    ran = unbroken["lora"]
    timeline = ran.of(WindowOpened, WindowClosed, PhaseBegan)
    for before, after in pairwise(timeline):
        if isinstance(before, WindowOpened):
            assert isinstance(after, WindowClosed), "a phase began within a window"
    opened, closed = ran.of(WindowOpened), ran.of(WindowClosed)
    for start, end in zip(opened, closed, strict=True):
        inside = [step for step in ran.of(Step) if start.after_step < step.step <= end.after_step]
        assert sum(step.seconds for step in inside) == pytest.approx(end.t - start.t, abs=0.05)


@pytest.mark.parametrize("schedule", Schedule)
def test_the_learning_rate_follows_its_formula(schedule: Schedule, tmp_path: Path) -> None:
    config = job_config()
    config.train.epochs, config.train.max_steps, config.train.warmup = None, 6, 2
    config.train.schedule, config.measure.eval_rows = schedule, 0
    ran = run(config, tmp_path)
    after = [0, 1, 2, 3]  # steps since the warm-up, of 4
    expected = {
        Schedule.constant: [1.0] * 4,
        Schedule.linear: [1 - n / 4 for n in after],
        Schedule.cosine: [(1 + math.cos(math.pi * n / 4)) / 2 for n in after],
    }[schedule]
    rates = [rate / RATE for _, rate in ran.curve.values()]
    assert rates == pytest.approx([0.0, 0.5, *expected])
    assert not ran.of(Evaluated), "nothing is evaluated with measure.eval_rows=0"
    assert ran.saved == [5, 6]


# --- kills


@pytest.mark.parametrize(
    ("method", "killed_at", "goes_on_from"),
    some_by_day([("lora", 3, 0), ("lora", 9, 5), ("lora", 12, 9), ("qlora", 12, 9)], by_day=[("qlora", 12, 9)]),
)
def test_a_killed_job_goes_on_to_the_same_curve_bit_for_bit(
    method: str, killed_at: int, goes_on_from: int, unbroken: dict[str, Ran], tmp_path: Path
) -> None:
    whole = unbroken[method]
    first = run(job_config(**METHODS[method]), tmp_path, at_step(killed_at))
    if killed_at > EDGES[0]:  # as if a better adapter had come since: its step does not count
        (tmp_path / "best/adapter_model.safetensors").unlink()
        (tmp_path / "best/adapter_model.safetensors").write_bytes(b"another")
    second = resume(job_config(**METHODS[method]), tmp_path)
    [resumed] = second.of(Resumed)
    assert resumed.step == goes_on_from
    assert list(second.curve) == list(range(goes_on_from + 1, STEPS + 1))
    assert second.of(WindowOpened)[0].after_step == goes_on_from + 1, "one step warms up again"
    assert first.curve | second.curve == whole.curve
    assert first.heldout | second.heldout == whole.heldout
    assert same(second.adapter(), whole.adapter())
    assert any("starts from the beginning" in text for text in second.warnings) == (goes_on_from == 0)


def test_a_job_does_not_go_on_with_other_rows(tmp_path: Path) -> None:
    config = job_config()
    rows = [json.dumps({"text": f"Row {number} of its own."}) for number in range(24)]
    config.data.source, config.data.path = DataSource.file, str(tmp_path / "rows.jsonl")
    Path(config.data.path).write_text("\n".join(rows))
    run(config, tmp_path, at_step(8))
    config.resume = True
    Path(config.data.path).write_text("\n".join([*rows[:-1], rows[0]]))
    outcome, reason = ended(run(config, tmp_path).events)
    assert outcome == "refused"
    assert "until step 5" in reason
    Path(config.data.path).write_text("\n".join(rows))
    mark = _mark(tmp_path / "checkpoints/000005")
    said = json.loads(mark.read_text())
    del said["facts"]["rows"]  # as earlier versions wrote it
    mark.write_text(json.dumps(said))
    assert resume(config, tmp_path).of(Resumed)[0].step == 5


def test_a_kill_while_a_checkpoint_is_written_leaves_a_torn_one_that_is_never_used(
    unbroken: dict[str, Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job_config(**METHODS["lora"])
    with monkeypatch.context() as patch:
        _break_writing(patch, Killed(), after=4)  # files by torch.save: three in the first checkpoint
        first = run(config, tmp_path)
    assert (first.saved, first.kept) == ([5], ["000005", "checkpoint-9"])
    second = resume(config, tmp_path)
    assert second.of(Resumed)[0].step == 5
    assert first.curve | second.curve == unbroken["lora"].curve
    assert second.kept == ["000014", "000018"]


def _mark(folder: Path) -> Path:
    return folder / "complete.json"


@pytest.mark.parametrize(
    "tear",
    [
        lambda folder: _mark(folder).unlink(),
        lambda folder: _mark(folder).write_text("{"),
        lambda folder: (folder / "optimizer.pt").unlink(),
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"cut"),
        lambda folder: folder.rename(folder.with_name("checkpoint-14")),
    ],
    ids=["no mark", "half a mark", "a file less", "half a file", "not renamed"],
)
def test_what_is_not_whole_is_not_used(tear: Callable[[Path], None], unbroken: dict[str, Ran], tmp_path: Path) -> None:
    shutil.copytree(unbroken["lora"].folder, tmp_path / "trial")
    checkpoints = Checkpoints(tmp_path / "trial", 2, Lora(TrialConfig()))
    assert [each.step for each in checkpoints.all()] == [14, 18]
    tear(checkpoints.root / "000018")
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.step == 14
    checkpoints.remove_torn()
    assert [path.name for path in checkpoints.root.iterdir()] == ["000014"]


def test_a_job_killed_behind_its_last_step_does_not_train_again(unbroken: dict[str, Ran], tmp_path: Path) -> None:
    config = job_config(**METHODS["lora"])
    over = Phase.evaluation_after.value
    run(config, tmp_path, lambda event: isinstance(event, PhaseBegan) and event.phase == over)
    second = resume(config, tmp_path)
    assert second.of(Resumed)[0].step == STEPS
    assert not second.of(Step)
    assert same(second.adapter(), unbroken["lora"].adapter())


# --- a full disk


def _break_writing(patch: pytest.MonkeyPatch, error: BaseException, after: int) -> None:
    """Let torch.save fail once, when it has written `after` files."""
    real, calls = torch.save, [0]

    def save(*arguments: Any, **named: Any) -> None:
        calls[0] += 1
        if calls[0] == after + 1:
            Path(arguments[1]).write_bytes(b"half")
            raise error
        real(*arguments, **named)

    patch.setattr(torch, "save", save)


def _break_adapter(patch: pytest.MonkeyPatch, error: Exception, after: int) -> None:
    """Let PEFT fail once, when it has written `after` adapters."""
    real, calls = PeftModel.save_pretrained, [0]

    def save(*arguments: Any, **named: Any) -> None:
        calls[0] += 1
        if calls[0] == after + 1:
            raise error
        real(*arguments, **named)

    patch.setattr(PeftModel, "save_pretrained", save)


TORCH_SAYS = "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"
"""To /dev/full, torch 2.13."""


def test_a_full_disk_costs_the_checkpoint_and_says_so(
    unbroken: dict[str, Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job_config(**METHODS["lora"])
    _break_writing(monkeypatch, RuntimeError(TORCH_SAYS), after=3)  # in the second checkpoint
    _break_adapter(monkeypatch, SafetensorError("I/O error: No space left on device (os error 28)"), after=3)
    kept: dict[int, list[str]] = {}

    def look(event: Event) -> bool:
        if isinstance(event, Step):
            kept[event.step] = [path.name for path in (tmp_path / "checkpoints").glob("*")]
        return False

    ran = run(config, tmp_path, look)
    assert ended(ran.events) == ("finished", "")
    assert ran.saved == [5, 18]
    assert kept[10] == kept[15] == ["000005"], "the one before is kept, the torn one is gone"
    assert [text.split(" was not saved")[0] for text in ran.warnings if "not saved" in text] == [
        "the checkpoint of step 9",
        "the checkpoint of step 14",
    ]
    assert ran.curve == unbroken["lora"].curve


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (SafetensorError("I/O error"), True),
        (RuntimeError(TORCH_SAYS), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
    ],
)
def test_nothing_but_a_file_that_cannot_be_written_is_a_fault_of_the_disk(error: Exception, is_one: bool) -> None:
    assert is_disk_fault(error) == is_one


# --- the best adapter, and early stopping


def test_the_adapter_is_that_of_the_lowest_heldout_loss(unbroken: dict[str, Ran], tmp_path: Path) -> None:
    ran = unbroken["lora"]
    lowest = min(EDGES, key=lambda step: ran.heldout[step])
    assert lowest != STEPS, "random tokens are learned by heart: else the test shows nothing"
    assert ran.heldout[Phase.evaluation_after.value] == ran.heldout[lowest]
    assert same(ran.adapter(), ran.adapter("best"))
    config = job_config(**METHODS["lora"])
    config.train.keep_best = False
    last = run(config, tmp_path)
    assert last.heldout[Phase.evaluation_after.value] == last.heldout[STEPS] == ran.heldout[STEPS]
    assert same(last.adapter(), ran.adapter("checkpoints/000018"))


def test_a_job_stops_early_and_counts_on_after_a_kill(unbroken: dict[str, Ran], tmp_path: Path) -> None:
    config = job_config(**METHODS["lora"])
    config.train.early_stopping = 2
    heldout = unbroken["lora"].heldout
    assert heldout[5] < min(heldout[9], heldout[14]), "the two evaluations after the first are no better"
    first = run(config, tmp_path, at_step(12))
    second = resume(config, tmp_path)
    assert max(second.curve) == 14
    assert second.saved[-1] == 14
    assert first.curve | second.curve == {s: v for s, v in unbroken["lora"].curve.items() if s <= 14}
    assert same(second.adapter(), unbroken["lora"].adapter())


# --- spikes


def _spike(patch: pytest.MonkeyPatch, step: int, times: int) -> None:
    """Make the loss of a step NaN, the first `times` that it is taken."""
    real, left = JobTelemetry._take_step, [times]

    def take(self: JobTelemetry, now: int, learning_rate: float | None = None) -> None:
        if now == step and left[0]:
            left[0] -= 1
            self._loss = self._loss * math.nan
        real(self, now, learning_rate)

    patch.setattr(JobTelemetry, "_take_step", take)


def test_a_spike_stops_the_job_and_names_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = job_config()
    config.grad_accum_steps, config.measure.eval_rows = 2, 0  # epochs of five steps, the fifth with one micro-batch
    train = checked_examples(config, load_architecture(config.model))[0].train
    batches: list[list[int]] = []
    real = Collator.__call__

    def collate(self: Collator, examples: Any) -> Any:
        if examples[0] in train:  # the model is probed with other rows
            batches.append([train.index(example) for example in examples])
        return real(self, examples)

    monkeypatch.setattr(Collator, "__call__", collate)
    _spike(monkeypatch, step=8, times=1)
    config.resume = True  # of the sweep: this trial of it is new
    ran = run(config, tmp_path)
    assert not ran.of(Resumed)
    assert ended(ran.events)[0] == "diverged"
    [spiked] = ran.of(Spiked)
    assert (spiked.step, spiked.action, spiked.learning_rate) == (8, "stop", None)
    # an epoch has nine micro-batches; step 8 is the third of the second
    assert spiked.rows == batches[9 + 4] + batches[9 + 5]
    plan = plan_job(config, len(train))
    assert rows_of_step(config, len(train), plan, 5) == batches[8], "the last step of an epoch"
    assert rows_of_step(config, len(train), plan, 1) == batches[0] + batches[1]


def test_a_job_goes_back_and_on_at_half_the_rate(
    unbroken: dict[str, Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job_config(**METHODS["lora"])
    config.train.on_spike = OnSpike.lower_lr
    _spike(monkeypatch, step=7, times=2)
    ran = run(config, tmp_path)
    assert ended(ran.events) == ("finished", "")
    assert [(s.step, s.action, s.learning_rate) for s in ran.of(Spiked)] == [
        (7, "lower_lr", RATE / 2),
        (7, "lower_lr", RATE / 4),
    ]
    assert [resumed.step for resumed in ran.of(Resumed)] == [5, 5]
    whole = unbroken["lora"].curve
    for step, (_, rate) in ran.curve.items():
        assert rate == pytest.approx(whole[step][1] * (1.0 if step <= 5 else 0.25))
    assert ran.curve[6][0] == whole[6][0], "the same weights, rows and dropout as before"
    assert len(ran.of(WindowOpened)) == len(ran.of(WindowClosed))
    # a kill later on does not bring the rate back
    (tmp_path / "again").mkdir()
    _spike(monkeypatch, step=7, times=2)
    first = run(config, tmp_path / "again", at_step(12))
    assert first.curve | resume(config, tmp_path / "again").curve == ran.curve


def test_returns_before_a_kill_count_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = job_config(**METHODS["lora"])
    config.train.on_spike = OnSpike.lower_lr
    with monkeypatch.context() as before:
        _spike(before, step=7, times=2)
        assert len(run(config, tmp_path, at_step(12)).of(Spiked)) == 2
    _spike(monkeypatch, step=13, times=2)
    config.resume = True
    ran = run(config, tmp_path)
    assert [(s.step, s.action) for s in ran.of(Spiked)] == [(13, "lower_lr"), (13, "stop")]
    outcome, reason = ended(ran.events)
    assert outcome == "diverged"
    assert "3 times" in reason


def test_before_the_first_checkpoint_a_job_starts_again_and_the_fourth_spike_stops_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job_config(**METHODS["lora"])
    config.train.on_spike = OnSpike.lower_lr
    _spike(monkeypatch, step=3, times=4)
    ran = run(config, tmp_path)
    outcome, reason = ended(ran.events)
    assert outcome == "diverged"
    assert "nan at step 3" in reason
    assert "3 times" in reason
    assert [s.learning_rate for s in ran.of(Spiked)] == [RATE / 2, RATE / 4, RATE / 8, None]
    assert [resumed.step for resumed in ran.of(Resumed)] == [0, 0, 0]


def test_weights_that_are_not_finite_are_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = job_config()
    real = JobTelemetry._take_step

    def take(self: JobTelemetry, step: int, learning_rate: float | None = None) -> None:
        real(self, step, learning_rate)
        if step == 9:
            trained[0].data.fill_(math.nan)

    trained: list[Any] = []
    watch = JobTelemetry.watch

    def note(self: JobTelemetry, model: torch.nn.Module) -> None:
        trained.extend(parameter for parameter in model.parameters() if parameter.requires_grad)
        watch(self, model)

    monkeypatch.setattr(JobTelemetry, "_take_step", take)
    monkeypatch.setattr(JobTelemetry, "watch", note)
    ran = run(config, tmp_path)
    assert ended(ran.events)[0] == "diverged"
    assert ran.kept == ["000005"]


# --- optimizers


@pytest.mark.parametrize(
    ("optim", "target"),
    [("adamw_torch_fused", None), ("adafactor", None), ("paged_adamw_8bit", None), (None, "torch.optim.SGD")],
)
def test_an_optimizer_is_saved_and_loaded_whole_also_with_loras_b_faster(
    optim: str | None, target: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job_config()
    config.optimizer.optim, config.optimizer.target = optim, target
    config.optimizer.args = {"momentum": 0.9} if target else {}
    config.train.epochs, config.train.max_steps, config.method.b_learning_rate_ratio = None, 8, 4.0
    config.measure.eval_rows = 0
    rates: list[list[float]] = []
    pre = JobTelemetry.on_pre_optimizer_step

    def note(self: JobTelemetry, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        pre(self, args, state, control, **kwargs)
        rates.append([group["lr"] for group in kwargs["optimizer"].param_groups if group["params"]])

    monkeypatch.setattr(JobTelemetry, "on_pre_optimizer_step", note)
    first = run(config, tmp_path, at_step(8))
    second = resume(config, tmp_path)
    assert {step: first.curve[step] for step in (6, 7, 8)} == second.curve
    assert all(b == pytest.approx(4 * a) for a, b in rates)
    assert [a for a, _ in rates] == [rate for ran in (first, second) for _, rate in ran.curve.values()]


@pytest.mark.gpu
@pytest.mark.parametrize("engine", [EngineKind.eager, EngineKind.graph])
def test_on_a_card_a_killed_job_goes_on_with_the_same_kind_of_state(
    engine: EngineKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its optimizer's state is in managed memory again, and nothing is left to run unrecorded."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    config = job_config(rank=1024, quantization=Quantization.nf4)  # matrices that are large enough to be paged
    config.optimizer.optim, config.engine.kind, config.learning_rate = "paged_adamw_8bit", engine, 1e-4
    config.precision.dtype = DType.bf16
    first = run(config, tmp_path, at_step(8))
    second = resume(config, tmp_path)
    again = [second.curve[step][0] for step in (6, 7, 8)]
    assert again == pytest.approx([first.curve[step][0] for step in (6, 7, 8)], abs=0.02)
    before, after = (ran.of(OptimizerMemory)[0] for ran in (first, second))
    assert before.paged_bytes == after.paged_bytes > 0
    assert [(done.unrecorded, done.compilations) for done in second.of(EngineDone)] in ([], [(0, 0)])


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # torch's, of its own compiler and profiler
@pytest.mark.parametrize("dtype", [DType.bf16, DType.fp16])
@pytest.mark.parametrize("engine", [EngineKind.eager, EngineKind.graph])
def test_on_a_card_a_killed_lean_job_goes_on_with_the_losses_of_one_that_was_not(
    engine: EngineKind, dtype: DType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every way to save memory at once, with accumulation; fp16 has the scaler's state, too."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")

    def lean() -> TrialConfig:
        config = job_config(quantization=Quantization.nf4)
        config.model.architecture["tie_word_embeddings"] = False
        config.engine.kind, config.engine.mlp_tile, config.engine.chunked_loss = engine, 16, True
        config.engine.host_embeddings, config.engine.host_layers = True, "all"
        config.gradient_checkpointing, config.grad_accum_steps = Checkpointing.offloaded, 2
        config.precision.dtype, config.optimizer.optim = dtype, "adamw_bnb_8bit"
        config.learning_rate, config.train.checkpoint_every = 1e-3, 3
        return config

    whole = run(lean(), tmp_path / "whole")
    assert ended(whole.events) == ("finished", "")
    run(lean(), tmp_path / "killed", at_step(5))
    second = resume(lean(), tmp_path / "killed")
    [resumed] = second.of(Resumed)
    assert resumed.step == 3
    later = [step for step in whole.curve if step > resumed.step]
    assert len(later) > 3
    for step in later:
        assert second.curve[step] == pytest.approx(whole.curve[step], abs=0.01), step
    assert whole.curve[later[0]][0] - whole.curve[later[-1]][0] > 0.05  # it learns, so that what is lost shows
    for ran in (whole, second):
        facts = ran.of(RanFacts)[0].facts
        assert (facts["embeddings"], facts["gradient_checkpointing"]) == ("host", "offloaded")
        assert facts["host_layers"].split(" of ")[0] == facts["host_layers"].split(" of ")[1]


def test_a_spike_that_began_before_all_kept_checkpoints_goes_back_to_the_start(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 1, Lora(TrialConfig()))

    def save(step: int) -> None:
        written = tmp_path / "checkpoints" / f"checkpoint-{step}"
        written.mkdir(parents=True)
        (written / "weights").write_text("1")
        checkpoints.complete(written, step, {})

    for step in (4, 8):
        save(step)
    assert checkpoints.go_back_before(3) is None
    assert [each.step for each in checkpoints.all()] == [8], "nothing is lost where there is nothing to go back to"
    for step in (0, 12, 16):
        save(step)
    assert [each.step for each in checkpoints.all()] == [0, 16]
    found = checkpoints.go_back_before(3)
    assert found is not None
    assert (found.step, [each.step for each in checkpoints.all()]) == (0, [0])
