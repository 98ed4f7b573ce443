"""Forward and backward over fixed memory inside an unpatched Trainer: the same training, bit for bit."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import some_by_day
from engine_models import adapted, adapters, loss_and_gradients, padded
from peft import get_peft_model_state_dict
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from lora_lab.worker.engines.chunked_loss import use_chunked_loss
from lora_lab.worker.engines.graph_step import GraphStep, use_graph_step
from lora_lab.worker.engines.trainer_shortcuts import TrainerShortcuts

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

WIDTHS = (32, 48, 64)


def plain_step(model: Any, dtype: torch.dtype = torch.float32, accumulates: bool = True) -> GraphStep:
    autocast = functools.partial(
        torch.autocast, "cpu", torch.bfloat16, enabled=dtype is torch.bfloat16, cache_enabled=False
    )
    return GraphStep(model, autocast, graphs=False, accumulates=accumulates)


def stepped(model: Any, dtype: torch.dtype = torch.float32, accumulates: bool = True) -> GraphStep:
    step = plain_step(model, dtype, accumulates)
    use_graph_step(model, step)
    return step


class Order(TrainerCallback):  # type: ignore[misc]
    """Which events came, and what the model had at each."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.norms: list[float] = []
        self.answers: list[tuple[Any, ...]] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.names.append("on_pre_optimizer_step")
        self.norms.append(float(sum(p.grad.double().norm() ** 2 for p in adapters(model).values()) ** 0.5))
        self.answers.append((model.num_parameters(exclude_embeddings=True), model.num_parameters(), model.training))


def _noted(name: str) -> Callable[..., None]:
    def note(self: Order, *_: Any, **__: Any) -> None:
        self.names.append(name)

    return note


for _name in dir(TrainerCallback):
    if _name.startswith("on_") and _name not in vars(Order):
        setattr(Order, _name, _noted(_name))


@dataclass
class Ran:
    weights: Tensor
    history: list[dict[str, float]]
    order: Order
    step: GraphStep | None
    trainer: Trainer
    model: Any


def rows() -> list[dict[str, Tensor]]:
    """Of all of WIDTHS."""
    made = []
    for i in range(24):
        batch = padded([9 + i, 14 + 2 * i], 64, seed=i)
        made += [{name: tensor[row] for name, tensor in batch.items()} for row in (0, 1)]
    return made


def collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    longest = max(int(example["attention_mask"].sum()) for example in examples)
    width = next(width for width in WIDTHS if width >= longest)
    return {name: torch.stack([example[name][:width] for example in examples]) for name in examples[0]}


def run(
    folder: Path,
    static: bool,
    *,
    quick: bool = True,
    record: tuple[int, ...] = WIDTHS,
    chunked: bool = False,
    resume: str | None = None,
    model: Any = None,
    rate: float = 5e-3,
    lora: dict[str, Any] | None = None,
    **arguments: Any,
) -> Ran:
    made = adapted(lora=lora) if model is None else model
    if chunked:
        use_chunked_loss(made)
    dtype = torch.bfloat16 if arguments.get("bf16") else torch.float32
    often = arguments.get("gradient_accumulation_steps", 1)
    step = stepped(made, dtype, accumulates=often > 1) if static else None
    order = Order()
    asked: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": rate,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        **arguments,
    }

    class Record(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
            assert step is not None
            model.train()
            for width in sorted(record, reverse=True):
                batch = padded([width, width], width, seed=99)
                step.record({**batch, "num_items_in_batch": torch.tensor(7)})

    own: list[TrainerCallback] = [Record()] if static else []
    if static and quick:
        own.append(TrainerShortcuts())
    data: Any = rows()
    trainer = Trainer(
        model=made,
        args=TrainingArguments(**asked),
        train_dataset=data,
        eval_dataset=data[:6],
        data_collator=collate,
        callbacks=[*own, order],
    )
    if step is not None:
        step.use_scaler(trainer.accelerator.scaler)
    trainer.train(resume_from_checkpoint=resume)
    weights = torch.cat([p.detach().flatten() for p in adapters(made).values()])
    kept = ("loss", "eval_loss", "grad_norm", "learning_rate")
    history = [{key: entry[key] for key in kept if key in entry} for entry in trainer.state.log_history]
    return Ran(weights.clone(), [entry for entry in history if entry], order, step, trainer, made)


def assert_same(one: Ran, other: Ran) -> None:
    assert one.history == other.history
    assert len(one.history) >= 5
    assert torch.equal(one.weights, other.weights)
    assert one.order.names == other.order.names
    assert one.order.norms == other.order.norms
    assert one.order.answers == other.order.answers


CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": True},
    "bf16, four micro-batches": {"bf16": True, "gradient_accumulation_steps": 4, "max_steps": 6, "max_grad_norm": 0.3},
    "fp32, four micro-batches": {"gradient_accumulation_steps": 4, "max_grad_norm": 0.3},
    "clipped": {"max_grad_norm": 0.3},
    "not clipped": {"max_grad_norm": 0},
    "evaluated in between": {"eval_strategy": "steps", "eval_steps": 2, "bf16": True},
    "cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 2, "max_steps": 7},
    "fused": {"optim": "adamw_torch_fused"},
    "8 bit": {"optim": "adamw_8bit"},
    "adafactor": {"optim": "adafactor", "gradient_accumulation_steps": 2},
    "weight decay": {"weight_decay": 0.1, "bf16": True},
    "chunked": {"chunked": True, "bf16": True, "gradient_accumulation_steps": 2},
    "chunked, evaluated": {"chunked": True, "eval_strategy": "steps", "eval_steps": 2},
    "dora": {"lora": {"use_dora": True}, "bf16": True},
    "without quick answers": {"quick": False, "max_grad_norm": 0.3},
}


BY_NIGHT = {
    *("fp32", "bf16", "fp32, four micro-batches", "clipped", "not clipped", "cosine", "fused", "weight decay"),
    *("adafactor", "chunked, evaluated"),
}
"""Each of their settings is in another case or test too."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.nightly] if name in BY_NIGHT else []) for name in CASES]
)
def test_training_is_bit_for_bit_that_of_an_untouched_model(tmp_path: Path, name: str) -> None:
    eager = run(tmp_path / "eager", False, **CASES[name])
    static = run(tmp_path / "static", True, **CASES[name])
    assert_same(static, eager)
    assert static.step is not None
    micro = CASES[name].get("max_steps", 5) * CASES[name].get("gradient_accumulation_steps", 1)
    assert (static.step.replays, static.step.unrecorded) == (micro, 0)
    start = torch.cat([p.detach().flatten() for p in adapters(adapted(lora=CASES[name].get("lora"))).values()])
    assert not torch.equal(static.weights, start), "something was learned"


def test_several_widths_really_came(tmp_path: Path) -> None:
    ran = run(tmp_path, True, record=(64,), max_steps=8)
    assert ran.step is not None
    assert 0 < ran.step.unrecorded < 8
    assert ran.step.unrecorded + ran.step.replays == 8


@pytest.mark.parametrize("bf16", some_by_day([False, True], by_day=[False]))
def test_shapes_that_were_not_recorded_train_the_same(tmp_path: Path, bf16: bool) -> None:
    eager = run(tmp_path / "eager", False, bf16=bf16)
    static = run(tmp_path / "static", True, record=(), bf16=bf16)
    assert_same(static, eager)
    assert static.step is not None
    assert (static.step.replays, static.step.unrecorded) == (0, 5)


@pytest.mark.parametrize("static", [False, True])
def test_a_run_that_was_cut_and_resumed_ends_as_the_whole_one(tmp_path: Path, static: bool) -> None:
    """From the static run's checkpoint, both ways."""
    how: dict[str, Any] = {"max_steps": 6, "lr_scheduler_type": "cosine", "bf16": True}
    whole = run(tmp_path / "whole", True, save_strategy="steps", save_steps=3, **how)
    saved = sorted(path.name for path in (tmp_path / "whole").glob("checkpoint-*"))
    assert saved == ["checkpoint-3", "checkpoint-6"]
    torch.manual_seed(5)
    resumed = run(tmp_path / "resumed", static, resume=str(tmp_path / "whole" / "checkpoint-3"), **how)
    assert torch.equal(resumed.weights, whole.weights)
    assert resumed.history[-4:] == whole.history[-4:]


@pytest.mark.parametrize("bf16", some_by_day([False, True], by_day=[True]))
def test_after_training_the_model_still_answers(tmp_path: Path, bf16: bool) -> None:
    """run_trial takes accelerate's autocast wrapper off before it evaluates."""
    ran = run(tmp_path, True, bf16=bf16)
    batch = padded([30, 20], 32)
    with torch.no_grad():
        before = ran.model.eval()(**batch).loss
    ran.trainer.accelerator.unwrap_model(ran.model, keep_fp32_wrapper=False)
    with torch.no_grad():
        after = ran.model.eval()(**batch).loss
    assert float(after) == pytest.approx(float(before), rel=0.02)
    ran.model.train()
    assert bool(ran.model(**batch).loss.isfinite())


def test_dropout_leaves_the_order_of_rows_alone(tmp_path: Path) -> None:
    """A recording draws random numbers; which rows a batch has must not depend on them."""
    lora = {"lora_dropout": 0.2}
    seen: list[list[Tensor]] = []
    for static in (False, True):
        model = adapted(lora=lora)
        ids: list[Tensor] = []

        def note(_: Any, __: Any, given: dict[str, Any], ids: list[Tensor] = ids) -> None:
            ids.append(given["input_ids"].clone())

        model.register_forward_pre_hook(note, with_kwargs=True)
        run(tmp_path / str(static), static, model=model)
        seen.append(ids)
    assert len(seen[0]) == len(seen[1]) == 5
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_dropout_differs_from_call_to_call() -> None:
    model = adapted(lora={"lora_dropout": 0.5})
    step = stepped(model)
    batch = padded([30, 32], 32)
    step.record(batch)
    assert len({float(model(**batch).loss.detach()) for _ in range(4)}) == 4


def gradients_of(model: Any) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in adapters(model).items()}


def test_an_unrecorded_shape_is_counted_and_told_and_gives_the_same_gradient() -> None:
    told: list[tuple[int, ...]] = []
    model, eager = adapted(), adapted()
    step = stepped(model)
    step.on_unrecorded = told.append
    step.record(padded([64, 60], 64))
    for width in (64, 48, 48):
        batch = padded([width, 20], width)
        loss, expected = loss_and_gradients(eager, batch)
        found, gradients = loss_and_gradients(model, batch)
        assert found == loss
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    assert (step.unrecorded, step.replays, told) == (2, 1, [(2, 48), (2, 48)])


def test_a_batch_without_the_recorded_entries_counts_as_another_shape() -> None:
    model = adapted()
    step = stepped(model)
    batch = padded([32, 20], 32)
    step.record({**batch, "num_items_in_batch": torch.tensor(40)})
    expected = float(adapted()(**batch).loss.detach())
    assert float(model(**batch).loss.detach()) == expected
    assert step.unrecorded == 1


def test_what_was_recorded_with_is_not_what_is_trained_on() -> None:
    model, eager = adapted(), adapted()
    step = stepped(model)
    first = padded([32, 32], 32, seed=1)
    kept = {name: tensor.clone() for name, tensor in first.items()}
    step.record(first)
    for seed in range(2, 5):
        batch = padded([32, 10 + seed], 32, seed=seed)
        assert loss_and_gradients(model, batch)[0] == loss_and_gradients(eager, batch)[0]
    assert all(torch.equal(first[name], kept[name]) for name in first), "nor is the caller's batch written to"


def test_gradients_add_up_until_they_are_taken_away() -> None:
    model, eager = adapted(), adapted()
    step = stepped(model)
    step.record(padded([32, 32], 32))
    for _ in range(2):
        for seed in range(3):
            batch = padded([32, 10 + seed], 32, seed=seed)
            for each in (model, eager):
                (each(**batch).loss / 3).backward()
        found, expected = gradients_of(model), gradients_of(eager)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
        model.zero_grad()
        eager.zero_grad()
        assert all(parameter.grad is None for parameter in adapters(model).values())


def test_zeroed_gradients_serve_as_well_as_none() -> None:
    model, eager = adapted(), adapted()
    stepped(model).record(padded([32, 32], 32))
    for seed in range(3):
        batch = padded([32, 10 + seed], 32, seed=seed)
        for each in (model, eager):
            each.zero_grad(set_to_none=False)
            each(**batch).loss.backward()
        found, expected = gradients_of(model), gradients_of(eager)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_gradients_of_a_scaled_loss_and_an_overflow() -> None:
    model, eager = adapted(), adapted()
    step = stepped(model)
    step.record(padded([32, 32], 32))
    scaler = SimpleNamespace(_scale=torch.tensor(65536.0), get_scale=lambda: 65536.0)
    step.use_scaler(scaler)
    batch = padded([32, 15], 32)
    for scale in (65536.0, 32768.0, 2.0**20):
        scaler._scale = torch.tensor(scale)  # the GradScaler makes a new one now and then
        for each in (model, eager):
            each.zero_grad()
            (each(**batch).loss * scale).backward()
        found, expected = gradients_of(model), gradients_of(eager)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6 * scale)
    model.zero_grad()
    scaler._scale = torch.tensor(3e38)
    (model(**batch).loss * scaler._scale).backward()
    assert not all(bool(g.isfinite().all()) for g in gradients_of(model).values())


@pytest.mark.parametrize("overflowing", [False, True])
def test_a_real_grad_scaler_sees_the_first_step_as_it_would_without(overflowing: bool) -> None:
    """torch's GradScaler makes its scale when it first scales a loss, which is after the first forward."""
    model, eager = adapted(), adapted()
    step = stepped(model)
    step.record(padded([32, 32], 32))
    batch = padded([32, 15], 32)
    found = []
    for each in (model, eager):
        scaler = torch.amp.GradScaler("cpu", init_scale=3e38 if overflowing else 1024.0)
        if each is model:
            step.use_scaler(scaler)
        optimizer = torch.optim.SGD(adapters(each).values(), lr=0.1)
        scales = []
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(each(**batch).loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        found.append((scales, torch.cat([p.detach().flatten() for p in adapters(each).values()])))
    assert found[0][0] == found[1][0], "the scale after each step"
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def test_the_first_micro_batch_is_calculated_at_the_scalers_scale() -> None:
    """In fp16 gradients of an unscaled loss vanish."""
    model = adapted()
    step = stepped(model)
    step.record(padded([32, 32], 32))
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    step.use_scaler(scaler)
    scaler.scale(model(**padded([32, 15], 32)).loss).backward()
    assert float(step._scale) == 4096.0


def test_two_models_in_one_process_leave_each_other_alone() -> None:
    models = [adapted(seed=1), adapted(seed=2)]
    eager = [adapted(seed=1), adapted(seed=2)]
    steps = [stepped(model) for model in models]
    batch = padded([32, 20], 32)
    for step in steps:
        step.record(batch)
    losses = [model(**batch).loss for model in models]
    for loss in losses:
        loss.backward()
    for model, plain in zip(models, eager, strict=True):
        _, expected = loss_and_gradients(plain, batch)
        found = gradients_of(model)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_only_training_with_labels_is_taken_over() -> None:
    model, eager = adapted(), adapted()
    step = stepped(model)
    batch = padded([32, 20], 32)
    step.record(batch)
    asked = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(model(**asked).logits, eager(**asked).logits)
    with torch.no_grad():
        assert model(**batch).logits is not None
    assert model.eval()(**batch).logits is not None
    assert (step.replays, step.unrecorded) == (0, 0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_saved_is_what_was() -> None:
    model, plain = adapted(), adapted()
    kind, forward = type(model), type(model).forward
    step = stepped(model)
    step.record(padded([32, 20], 32))
    for take in (lambda m: m.state_dict(), get_peft_model_state_dict):
        mine, theirs = take(model), take(plain)
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert (type(model), type(model).forward) == (kind, forward)
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in plain.named_buffers()]


class Answers(TrainerCallback):  # type: ignore[misc]
    """Asks the model while training runs what Trainer asks, and what others might."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.seen.append(
            {
                "all": model.num_parameters(),
                "trained": model.num_parameters(only_trainable=True),
                "without embeddings": model.num_parameters(exclude_embeddings=True),
                "both": model.num_parameters(only_trainable=True, exclude_embeddings=True),
                "names": [name for name, _ in model.named_parameters()],
                "with gradients": len([p for p in model.parameters() if p.requires_grad]),
                "modes": {module.training for module in model.modules()},
                "state": sorted(model.state_dict()),
            }
        )
        assert model.eval() is model
        assert not any(module.training for module in model.modules())
        assert model.train() is model
        assert all(module.training for module in model.modules())
        assert model.train() is model


def test_quick_answers_are_the_right_ones_and_gone_in_the_end(tmp_path: Path) -> None:
    seen = []
    for callbacks in ([], [TrainerShortcuts()]):
        model = adapted()
        before = set(model.__dict__)
        kind = dict(vars(type(model)))
        asking = Answers()
        arguments = TrainingArguments(
            str(tmp_path), max_steps=3, report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True
        )
        data: Any = rows()
        Trainer(
            model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=[*callbacks, asking]
        ).train()
        seen.append(asking.seen)
        left = set(model.__dict__) - before
        assert not left & {"num_parameters", "train", "zero_grad", "parameters"}
        assert dict(vars(type(model))) == kind
        assert len(list(model.parameters())) > len(adapters(model))
    assert seen[0] == seen[1]
    assert len(seen[0]) == 3


def test_quick_zero_grad_takes_every_gradient_away() -> None:
    model = adapted()
    quick = TrainerShortcuts()
    arguments: Any = None
    quick.on_train_begin(arguments, arguments, arguments, model=model)
    model(**padded([32, 20], 32)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()
    assert all(parameter.grad is None for _, parameter in model.named_parameters())
    quick.on_train_end(arguments, arguments, arguments, model=model)
    quick.on_train_end(arguments, arguments, arguments, model=model)


def test_a_second_micro_batch_where_none_was_announced_is_an_error() -> None:
    model = adapted()
    stepped(model, accumulates=False)
    batch = padded([32, 32], 32)
    model.train()
    model(**batch).loss.backward()
    with pytest.raises(RuntimeError, match="grad_accum_steps"):
        model(**batch).loss.backward()
