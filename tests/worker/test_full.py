"""Every weight trained: what is learnt, counted, saved, loaded again and gone on with, and what it cannot be with."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_trials import ended, tiny_config
from transformers import AutoModelForCausalLM, set_seed

from lora_lab.base_weights import MODEL, trained_in
from lora_lab.composition.validation import faults
from lora_lab.config import EngineConfig, InvalidInput, TrainConfig, TrialConfig
from lora_lab.data_config import DataConfig
from lora_lab.dataset.row import Role, Turn
from lora_lab.events import Answered, EngineDone, Evaluated, Event, ModelCounted, OptimizerMemory, Ran, Step
from lora_lab.fit.optimizer import optimizer_state, trained_weights
from lora_lab.fit.shapes import shapes_of
from lora_lab.method_config import PrecisionConfig
from lora_lab.options import DataSource, DType, EngineKind, MethodKind, Quantization
from lora_lab.worker.answers import Answerer
from lora_lab.worker.check import checked_examples
from lora_lab.worker.checkpoint import check_not_quantised
from lora_lab.worker.data import Collator
from lora_lab.worker.engines import engine
from lora_lab.worker.engines.graph_step import forward_and_backward
from lora_lab.worker.merging import Merger
from lora_lab.worker.models import load_architecture, load_model
from lora_lab.worker.trial import run_trial

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def full_config(**more: Any) -> TrialConfig:
    """Two rows that come in every step, so that their order does not matter."""
    config = tiny_config(kind=MethodKind.full)
    config.batch_size, config.learning_rate = 2, 1e-3
    return replace(config, **more)


def train(config: TrialConfig, folder: Path, until: Callable[[Event], bool] = lambda _: False) -> list[Event]:
    events: list[Event] = []

    def emit(event: Event) -> None:
        events.append(event)
        if until(event):
            raise KeyboardInterrupt

    try:
        run_trial(config, folder, emit)
    except KeyboardInterrupt:
        return events
    assert ended(events) == ("finished", "")
    return events


def only(events: list[Event], kind: type) -> Any:
    [found] = [event for event in events if isinstance(event, kind)]
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrialConfig, Path, list[Event]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        config, folder = full_config(), tmp_path_factory.mktemp("full")
        return config, folder, train(config, folder)


def untrained(config: TrialConfig) -> Any:
    set_seed(config.seed)
    return load_model(config, load_architecture(config.model), torch.device("cpu"))


def batch_of(rows: Any, padding: int) -> dict[str, torch.Tensor]:
    made = Collator(pad_id=padding)(rows)
    return {name: tensor for name, tensor in made.items() if isinstance(tensor, torch.Tensor)}


def test_the_steps_are_those_of_plain_pytorch(trained: tuple[TrialConfig, Path, list[Event]]) -> None:
    config, folder, events = trained
    model = untrained(config).train()
    examples, padding = checked_examples(config, load_architecture(config.model))
    batch = batch_of(examples.train, padding)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    losses = []
    for _ in range(config.measure.warmup_steps + config.measure.steps):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert [event.loss for event in events if isinstance(event, Step)] == pytest.approx(losses, rel=1e-5)
    saved = load_file(folder / MODEL / "model.safetensors")
    own = model.state_dict()
    assert set(own) - set(saved) == {"lm_head.weight"}, "which is the embeddings"
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, own[name], rtol=0, atol=2e-6)


def test_chunks_of_the_loss_are_seen_below_trainers_autocast(tmp_path: Path) -> None:
    """accelerate wraps the forward of what it trains: here of the causal language model itself."""
    found = {}
    for chunked in (False, True):
        config = full_config(precision=PrecisionConfig(dtype=DType.bf16), engine=EngineConfig(chunked_loss=chunked))
        config.measure = replace(config.measure, eval_rows=2)
        events = train(config, tmp_path / str(chunked))
        assert only(events, Ran).facts["chunked_loss"] == str(chunked)
        found[chunked] = [event.loss for event in events if isinstance(event, Evaluated | Step)]
    assert found[True] == pytest.approx(found[False], abs=0.02)


def test_every_weight_is_counted_and_read_back(trained: tuple[TrialConfig, Path, list[Event]]) -> None:
    config, _, events = trained
    every = sum(p.numel() for p in untrained(config).parameters())
    facts = only(events, Ran).facts
    assert facts["trainable_parameters"] == str(every)
    assert (facts["adapter_dtypes"], facts["weight_dtypes"]) == (f"float32 {every}", "none")
    counted = only(events, ModelCounted)
    assert (counted.frozen, counted.weight_elements, counted.weight_bytes) == (0, every, 4 * every)
    assert (
        shapes_of(config.model).parameters == every == trained_weights(config.method, shapes_of(config.model)).elements
    )


def test_the_saved_model_loads_by_itself_and_has_the_loss_that_was_measured(
    trained: tuple[TrialConfig, Path, list[Event]],
) -> None:
    config, folder, events = trained
    assert trained_in(folder) == folder / MODEL
    model = AutoModelForCausalLM.from_pretrained(folder / MODEL).eval()
    examples, padding = checked_examples(config, load_architecture(config.model))
    with torch.no_grad():
        loss = model(**batch_of(examples.heldout, padding)).loss.item()
    [before, after] = [event.loss for event in events if isinstance(event, Evaluated)]
    assert loss == pytest.approx(after, rel=1e-5)
    assert after != pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "adamw_bnb_8bit"])
def test_the_estimated_state_is_what_the_optimizer_holds(
    trained: tuple[TrialConfig, Path, list[Event]], tmp_path: Path, optim: str
) -> None:
    config, _, events = trained
    if optim != config.optimizer.optim:
        config = full_config(optimizer=replace(config.optimizer, optim=optim))
        events = train(config, tmp_path)
    held = only(events, OptimizerMemory).total_bytes
    said = optimizer_state(config.optimizer, trained_weights(config.method, shapes_of(config.model))).total
    maps = 2 * 256 * 4 if "8bit" in optim else 0  # of the values of 8 bits, for each moment
    assert held == said + maps


@pytest.mark.nightly
def test_in_bf16_the_weights_stay_in_fp32_and_text_brings_a_tokenizer_and_answers(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"instruction": "What is {n}?", "output": "It is {n}."}}\n' for n in range(20)))
    config = full_config(data=DataConfig(source=DataSource.file, path=str(rows)), seq_len=128)
    config.precision.dtype, config.measure.answers = DType.bf16, 2
    events = train(config, tmp_path)
    facts = only(events, Ran).facts
    assert facts["autocast"] == "bf16"
    assert facts["adapter_dtypes"].split()[0] == "float32"
    assert [event.tuned for event in events if isinstance(event, Answered)] == [False, True]
    merger = Merger(config, tmp_path / MODEL, lambda _: None)
    losses = merger.merge(tmp_path / "out").losses
    assert losses is not None
    assert abs(losses.merged - losses.trained) < 0.01
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert out.dtype is torch.bfloat16
    answerer = Answerer(config, tmp_path / MODEL, as_conversations=True)
    tuned, base = answerer._model, answerer._writer._untrained
    assert base is None, "it is loaded once it is asked"
    answerer.answer([Turn(Role.user, "What is 3?")], tuned=False, most_tokens=2)
    base = answerer._writer._untrained
    assert not torch.equal(tuned.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert torch.equal(base.get_input_embeddings().weight, untrained(config).get_input_embeddings().weight)


@pytest.mark.nightly
def test_a_job_goes_on_from_its_checkpoint_to_the_same_weights(tmp_path: Path) -> None:
    config = full_config(train=TrainConfig(max_steps=4, checkpoint_every=2, eval_every=2, warmup=0))
    train(config, tmp_path / "whole")
    seen = 0

    def third_step(event: Event) -> bool:
        nonlocal seen
        seen += isinstance(event, Step)
        return seen == 3

    train(config, tmp_path / "cut", until=third_step)
    assert trained_in(tmp_path / "cut") is None
    train(replace(config, resume=True), tmp_path / "cut")
    whole, again = (load_file(tmp_path / name / MODEL / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    best = load_file(tmp_path / "whole" / "best" / "model.safetensors")
    assert all(torch.equal(whole[name], best[name]) for name in whole), "the best is what is saved"
    shutil.rmtree(tmp_path / "whole" / "best")


@pytest.mark.parametrize(
    ("engine", "checkpointing"),
    [
        (EngineConfig(mlp_tile=64), "full"),
        pytest.param(EngineConfig(chunked_loss=True), "offloaded", marks=pytest.mark.nightly),
        pytest.param(EngineConfig(), "selective", marks=pytest.mark.nightly),
    ],
)
def test_ways_to_save_memory_train_the_same_weights(
    trained: tuple[TrialConfig, Path, list[Event]], tmp_path: Path, engine: EngineConfig, checkpointing: str
) -> None:
    kind = type(full_config().gradient_checkpointing)
    train(full_config(engine=engine, gradient_checkpointing=kind[checkpointing]), tmp_path)
    one, other = (load_file(folder / MODEL / "model.safetensors") for folder in (trained[1], tmp_path))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of its own code, while it compiles
def test_compiling_holds_the_gradients_of_one_layer_and_leaves_nothing_to_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once can be more than training ever holds, with an optimizer within the backward."""
    held = []

    def noting(*arguments: Any) -> Any:
        loss, gradients = forward_and_backward(*arguments)
        held.append(sum(gradient.numel() for gradient in gradients))
        return loss, gradients

    monkeypatch.setattr(engine, "forward_and_backward", noting)
    config = full_config(engine=EngineConfig(kind=EngineKind.compile))
    events = train(config, tmp_path)
    layers = (config.model.architecture or {})["num_hidden_layers"]
    assert layers > 1
    assert held
    assert 0 < max(held) <= only(events, ModelCounted).trainable / layers
    assert only(events, EngineDone).compilations == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method.quantization": Quantization.nf4}, "Use method.quantization=none, or method=qlora."),
        ({"method.rank": 8}, "method.rank=8 has no effect with method=full"),
        ({"method.use_dora": True}, "method.use_dora=True has no effect"),
        ({"engine.kind": EngineKind.graph}, "Use engine=compile, engine=liger or engine=eager."),
        ({"engine.host_embeddings": True}, "Use engine.host_embeddings=false."),
        ({"engine.host_layers": 1}, "method.quantization=none"),
        ({"method.b_learning_rate_ratio": 4.0}, "method.b_learning_rate_ratio=4.0 has no effect"),
    ],
)
def test_what_needs_frozen_weights_is_refused_with_what_to_type(change: dict[str, Any], said: str) -> None:
    config = full_config()
    assert faults(config) == []
    for key, value in change.items():
        group, name = key.split(".")
        setattr(getattr(config, group), name, value)
    assert any(said in fault for fault in faults(config)), faults(config)


def test_weights_that_are_stored_in_4_bit_are_not_trained() -> None:
    config = full_config()
    architecture = load_architecture(config.model)
    architecture.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(InvalidInput, match="method=qlora"):
        check_not_quantised(config, architecture)
