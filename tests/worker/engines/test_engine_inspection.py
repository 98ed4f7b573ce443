"""What an engine must see in a live model before it runs it, and what it says of it after."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import compiles, lab_in
from engine_models import adapted, padded
from transformers import Trainer

from lora_lab.config import TrialConfig
from lora_lab.options import Checkpointing, EngineKind
from lora_lab.outcome import Unsupported
from lora_lab.worker.attention import AttentionKernels
from lora_lab.worker.engines import graph_step
from lora_lab.worker.engines.chunked_loss import use_chunked_loss
from lora_lab.worker.engines.engine import Engine
from lora_lab.worker.engines.graph_step import GraphStep
from lora_lab.worker.engines.inspection import engine_of, has_dropout, loss_is_chunked
from lora_lab.worker.phases import PhaseClock
from lora_lab.worker.training import checkpointing_arguments

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*checkpointing_enable. is deprecated:FutureWarning"),
]


def test_a_plain_model_is_eager_with_whole_logits() -> None:
    model = adapted()
    assert engine_of(model, None) is EngineKind.eager
    assert not loss_is_chunked(model)
    use_chunked_loss(model)
    assert loss_is_chunked(model)


def test_a_recorded_step_that_was_never_replayed_is_no_graph() -> None:
    model = adapted()
    step = GraphStep(model, lambda: torch.autocast("cpu", enabled=False), graphs=False)
    assert engine_of(model, step) is EngineKind.eager
    step.replays = 1
    assert engine_of(model, step) is EngineKind.graph


@pytest.mark.parametrize(
    ("own", "lora", "drops"),
    [
        ({}, {}, False),
        ({"attention_dropout": 0.1}, {}, True),
        ({}, {"lora_dropout": 0.1}, True),
        ({"attention_dropout": 0.0}, {"lora_dropout": 0.0}, False),
    ],
)
def test_dropout_is_seen_wherever_it_is(own: dict[str, Any], lora: dict[str, Any], drops: bool) -> None:
    assert has_dropout(adapted("llama", lora=lora, **own)) is drops


def test_a_graph_refuses_checkpointing_with_the_models_own_dropout() -> None:
    config = TrialConfig()
    config.engine.kind = EngineKind.graph
    config.gradient_checkpointing = Checkpointing.full
    clock = PhaseClock(print)
    with pytest.raises(Unsupported, match="gradient_checkpointing=none or engine=compile"):
        Engine(config, adapted("llama", attention_dropout=0.1), [], AttentionKernels(), print, clock)


def test_checkpointing_draws_a_models_own_dropout_the_same_twice() -> None:
    """With other random numbers in the recomputation the loss is the same and the gradient is wrong."""
    config = TrialConfig()
    config.gradient_checkpointing = Checkpointing.full

    def gradient(checkpointed: bool) -> torch.Tensor:
        model = adapted("llama", attention_dropout=0.3)
        if checkpointed:
            arguments = dict(checkpointing_arguments(config) or {})
            model.get_base_model().gradient_checkpointing_enable(
                arguments, every_n_layers=arguments.pop("every_n_layers")
            )
        torch.manual_seed(5)
        model(**padded([24, 17], 24)).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch.testing.assert_close(gradient(True), gradient(False))


def test_memory_is_seen_when_the_optimizer_has_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """With accumulation, many replays come before the first optimizer step."""
    model = adapted()
    step = GraphStep(model, lambda: torch.autocast("cpu", enabled=False), graphs=False)
    graph_step.use_graph_step(model, step)
    batch = padded([8, 8], 8)
    step.record(batch)
    [recorded] = step._recorded.values()
    recorded.graph = SimpleNamespace(replay=lambda: None)  # type: ignore[assignment]
    step.working_bytes = 50
    in_use = [100]
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: in_use[0])
    for _ in range(3):
        for _ in range(4):
            model(**batch).loss.backward()
        in_use[0] = 300
        model.zero_grad()
    assert step.replay_peak_bytes == 350


def test_a_plain_number_is_not_lost_in_a_recorded_step() -> None:
    with pytest.raises(TypeError, match="num_items_in_batch"):
        graph_step.tensors({"num_items_in_batch": 7})
    assert graph_step.tensors({"return_dict": True, "labels": None}) == {}


@pytest.mark.nightly
@compiles
def test_torch_told_to_compile_nothing_is_no_compiled_trial(tmp_path: Path) -> None:
    said = lab_in(tmp_path)(
        "model=tiny", "measure=quick", "tracking=none", "engine=compile", "engine.lengths=1", TORCHDYNAMO_DISABLE="1"
    )
    assert said.code == 1
    assert "engine: asked for compile, got eager" in " ".join(said.text.split())


def test_trainer_is_as_its_class_made_it() -> None:
    """No engine may have touched it: neither the class nor the loss it knows."""
    assert Trainer.training_step.__module__ == "transformers.trainer"
    assert Trainer.compute_loss.__module__ == "transformers.trainer"
