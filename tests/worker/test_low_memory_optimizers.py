"""Optimizers for little memory, each through a whole trial with method=full: what ran, what it holds, what it needs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import some_by_day
from killed_jobs import assert_it_goes_on_to_the_same_weights
from safetensors.torch import load_file
from tiny_trials import tiny_config, train

from lora_lab.base_weights import MODEL
from lora_lab.composition.compose import CONF
from lora_lab.composition.validation import faults
from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.events import Event, OptimizerMemory, Ran, Step
from lora_lab.fit.optimizer import optimizer_state, trained_weights
from lora_lab.fit.shapes import shapes_of
from lora_lab.method_config import OptimizerConfig
from lora_lab.options import DType, EngineKind, MethodKind, PlacementKind, Projection
from lora_lab.worker import in_backward, training
from lora_lab.worker.in_backward import InBackward
from lora_lab.worker.training import check_optimizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def preset(name: str) -> OptimizerConfig:
    """An option of conf/optimizer."""
    fields = yaml.safe_load((CONF / "optimizer" / f"{name}.yaml").read_text(encoding="utf-8"))
    kind = fields.pop("projection", None)
    return OptimizerConfig(**fields, projection=kind and Projection[kind])


def full_config(optimizer: OptimizerConfig, **more: Any) -> TrialConfig:
    config = tiny_config(kind=MethodKind.full)
    config.batch_size, config.learning_rate, config.max_grad_norm, config.optimizer = 2, 1e-3, 0.0, optimizer
    if optimizer.projection is not None and optimizer.projection_rank > 16:
        optimizer.projection_rank = 16
    return replace(config, **more)


def only(events: list[Event], kind: type) -> Any:
    [found] = [event for event in events if isinstance(event, kind)]
    return found


@pytest.mark.parametrize(
    ("name", "ran", "maps"),
    [
        pytest.param("galore", ("torch.AdamW", "32", "galore of rank 16", "False"), 0, marks=pytest.mark.nightly),
        ("galore_8bit", ("bitsandbytes.AdamW", "8", "galore of rank 16", "False"), 2 * 256 * 4),
        ("apollo", ("torch.AdamW", "32", "apollo of rank 16", "False"), 0),
        pytest.param(
            "apollo_mini", ("torch.AdamW", "32", "apollo_mini of rank 1", "False"), 0, marks=pytest.mark.nightly
        ),
        pytest.param("lomo", ("torch.SGD", "32", "none", "True"), 0, marks=pytest.mark.nightly),
        ("adalomo", ("transformers.Adafactor", "32", "none", "True"), 0),
    ],
)
def test_what_was_asked_for_runs_learns_and_holds_the_state_that_was_said(
    tmp_path: Path, name: str, ran: tuple[str, ...], maps: int
) -> None:
    """The maps are of bitsandbytes' 8-bit values, one for each moment."""
    config = full_config(preset(name), learning_rate=0.1 if name == "lomo" else 1e-3)
    events = train(config, tmp_path)
    facts = only(events, Ran).facts
    assert tuple(facts[f"optimizer_{key}"] for key in ("class", "bits", "projection", "in_backward")) == ran
    losses = [event.loss for event in events if isinstance(event, Step)]
    assert losses[-1] < losses[0]
    said = optimizer_state(config.optimizer, trained_weights(config.method, shapes_of(config.model))).total
    assert only(events, OptimizerMemory).total_bytes == said + maps


@pytest.mark.parametrize("name", some_by_day(["adamw", "adamw_8bit", "galore", "adafactor"], by_day=["adamw_8bit"]))
def test_updates_within_the_backward_are_those_after_it(tmp_path: Path, name: str) -> None:
    for folder, is_within in (("after", False), ("within", True)):
        config = full_config(replace(preset(name), in_backward=is_within))
        train(config, tmp_path / folder)
    after, within = (load_file(tmp_path / folder / MODEL / "model.safetensors") for folder in ("after", "within"))
    for weight, tensor in after.items():
        torch.testing.assert_close(within[weight], tensor, rtol=0, atol=1e-6)


@pytest.mark.nightly
def test_a_job_goes_on_with_the_state_of_its_checkpoint(tmp_path: Path) -> None:
    optimizer = replace(preset("galore"), in_backward=True, projection_steps=3)
    assert_it_goes_on_to_the_same_weights(full_config(optimizer), tmp_path)


def test_no_two_gradients_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_backward, "SMALL", 0)

    class Watched(InBackward, torch.optim.SGD):
        pass

    layers = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    held: list[int] = []
    for weight in layers.parameters():  # before the optimizer's own
        weight.register_post_accumulate_grad_hook(
            lambda _: held.append(sum(p.grad is not None for p in layers.parameters()))
        )
    optimizer = Watched(layers.parameters(), lr=0.1)
    before = [weight.clone() for weight in layers.parameters()]
    layers(torch.ones(2, 4)).sum().backward()
    assert held == [1] * 6
    assert all(not torch.equal(old, new) for old, new in zip(before, layers.parameters(), strict=True))
    optimizer.release()
    layers(torch.ones(2, 4)).sum().backward()
    assert all(weight.grad is not None for weight in layers.parameters())


def test_a_step_within_the_backward_looks_at_one_weight_and_small_ones_wait_for_its_end() -> None:
    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.append(sum(len(group["params"]) for group in self.param_groups))
            super().step(closure)

    class Ours(InBackward, Watched):
        pass

    seen: list[int] = []
    layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3)))
    biases = [each.bias for each in layers]
    optimizer = Ours([{"params": [each.weight for each in layers]}, {"params": biases}], lr=0.1)
    before = [weight.clone() for weight in layers.parameters()]
    layers(torch.ones(2, 64)).sum().backward()
    assert seen == [1, 1, 1]
    assert all(bias.grad is not None for bias in biases)
    optimizer.step()
    assert seen == [1, 1, 1, 6]
    assert all(not torch.equal(old, new) for old, new in zip(before, layers.parameters(), strict=True))
    assert all(weight.grad is None for weight in layers.parameters())


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("lomo", {"max_grad_norm": 1.0}, "Add max_grad_norm=0."),
        ("lomo", {"grad_accum_steps": 2}, "Use grad_accum_steps=1"),
        ("lomo", {"precision.dtype": DType.fp16}, "Use precision=bf16 or fp32."),
        ("lomo", {"placement.kind": PlacementKind.ddp, "placement.workers": 2}, "Use placement=one."),
        ("lomo", {"engine.kind": EngineKind.graph}, "Use engine=compile or engine=eager."),
        ("galore", {"method.kind": MethodKind.lora}, "Use method=full, or optimizer=adamw_fused."),
        ("apollo", {"precision.dtype": DType.fp16}, "Use precision=bf16."),
        ("adamw", {"optimizer.projection_rank": 8}, "has no effect without optimizer.projection"),
        ("adamw", {"optimizer.optim": "galore_adamw"}, "Use optimizer=galore."),
        ("adamw", {"optimizer.optim": "apollo_adamw"}, "Use optimizer=apollo."),
        ("adamw", {"optimizer.optim": "adalomo"}, "Use optimizer=adalomo."),
    ],
)
def test_what_cannot_be_combined_is_refused_with_what_to_type(name: str, change: dict[str, Any], said: str) -> None:
    config = full_config(preset(name))
    for key, value in change.items():
        *groups, last = key.split(".")
        node: Any = config
        for group in groups:
            node = getattr(node, group)
        setattr(node, last, value)
    assert any(said in fault for fault in faults(config)), faults(config)


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InvalidInput, match=r"lora_lab\[torchao\]"):
        check_optimizer(preset("adamw_torchao_8bit"))
