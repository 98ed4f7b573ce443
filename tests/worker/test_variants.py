"""Variants of LoRA through whole trials: what is saved, next to the model as it was, is the model that was trained."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import some_by_day
from engine_models import SHAPES, adapters, furthest, loss_and_gradients, padded, stepped
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_trials import ended, tiny_config
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, set_seed

from lora_lab.composition.variants import variant_faults
from lora_lab.config import ModelConfig, TrialConfig
from lora_lab.events import Event, Ran, Step
from lora_lab.method_config import MethodConfig
from lora_lab.options import Init, MethodKind, ModelSource, Quantization
from lora_lab.worker.engines.chunked_loss import use_chunked_loss
from lora_lab.worker.engines.tiled_mlp import tile_mlps
from lora_lab.worker.merging import Merger
from lora_lab.worker.models import load_architecture, load_model
from lora_lab.worker.quantised import is_quantised
from lora_lab.worker.stages import model_loading
from lora_lab.worker.tiny_tokenizer import tiny_tokenizer
from lora_lab.worker.trainables import lora
from lora_lab.worker.trainables.inspection import adapter_differences, adapter_facts
from lora_lab.worker.trainables.start import before_training, note_start, start_of
from lora_lab.worker.trained import load_dequantised, load_trained, ready_to_answer
from lora_lab.worker.trial import run_trial

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
]

CPU = torch.device("cpu")
IDS = torch.arange(3, 35).reshape(2, 16)

VARIANTS: dict[str, dict[str, Any]] = {
    "gaussian": {"init": Init.gaussian},
    "orthogonal": {"init": Init.orthogonal},
    "pissa": {"init": Init.pissa},
    "pissa_rslora": {
        "init": Init.pissa,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"k_proj": 5.0},
    },
    "olora": {"init": Init.olora},
    "eva": {"init": Init.eva},
    "lora_fa": {"freeze_a": True},
    "lora_plus": {"b_learning_rate_ratio": 8.0},
    "tokens": {"trained_tokens": ["a", "b"], "init": Init.olora},
    "vera": {"kind": MethodKind.vera},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3.0}},
}


class Trial:
    """A whole trial in this process, and its model as it was left."""

    model: Any

    def __init__(self, config: TrialConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert variant_faults(config) == []
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        load = model_loading.load_model

        def noted(*args: Any) -> Any:
            self.model = load(*args)
            return self.model

        monkeypatch.setattr(model_loading, "load_model", noted)
        self.events: list[Event] = []
        run_trial(config, folder, self.events.append)
        assert ended(self.events) == ("finished", "")

    @property
    def facts(self) -> dict[str, str]:
        return next(event.facts for event in self.events if isinstance(event, Ran))


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def base(config: TrialConfig) -> Any:
    set_seed(config.seed)
    plain = tiny_config()
    return load_model(plain, load_architecture(plain.model), CPU).unload()


@pytest.mark.parametrize(
    "name",
    some_by_day([*VARIANTS], by_day=["pissa_rslora", "eva", "lora_fa", "lora_plus", "tokens", "vera"]),
)
def test_the_saved_adapter_on_the_model_as_it_was_is_the_model_that_was_trained(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(**{"rank": 4, **VARIANTS[name]})
    trial = Trial(config, tmp_path, monkeypatch)
    live = logits(trial.model)
    untouched = logits(base(config))
    assert (live - untouched).abs().max() > 1e-3
    for model in (
        PeftModel.from_pretrained(base(config), tmp_path / "adapter"),
        load_trained(config, tmp_path / "adapter", CPU),
    ):
        assert torch.allclose(logits(model), live, atol=2e-5)
        with model.disable_adapter():
            assert torch.allclose(logits(model), untouched, atol=1e-6)
    with before_training(trial.model):
        assert torch.allclose(logits(trial.model), untouched, atol=2e-5)
    assert torch.equal(logits(trial.model), live)
    asked, facts = config.method, trial.facts
    assert facts["adapters"] == asked.kind.name
    assert facts["adapters_trained_tokens"] == str(len(asked.trained_tokens))
    assert facts["adapters_frozen_a"] == str(asked.freeze_a)
    if asked.kind is MethodKind.lora:
        assert facts["adapters_start"] == asked.init.name
    if asked.kind is MethodKind.lora and not asked.freeze_a:
        assert facts["adapters_b_learning_rate_ratio"] == f"{asked.b_learning_rate_ratio or 1:g}"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"init": Init.pissa}, "adapters_start: asked for pissa, got kaiming"),
        ({"freeze_a": True}, "adapters_frozen_a: asked for True, got False"),
        ({"b_learning_rate_ratio": 8.0}, "adapters_b_learning_rate_ratio: asked for 8, got 1"),
        ({"kind": MethodKind.vera}, "adapters: asked for vera, got lora"),
        ({"trained_tokens": ["a"]}, "adapters_trained_tokens: asked for 1, got 0"),
    ],
)
def test_a_variant_that_did_not_run_is_no_measurement(asked: dict[str, Any], said: str) -> None:
    plain = tiny_config()
    model = load_model(plain, load_architecture(plain.model), CPU)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    facts = adapter_facts(model, optimizer)
    assert adapter_differences(facts, plain.method) == []
    assert said in adapter_differences(facts, MethodConfig(**asked))


# --- engines


def as_graph(model: Any, batch: dict[str, torch.Tensor]) -> None:
    stepped(model, torch.float32).record(batch)


def in_parts(model: Any, _: dict[str, torch.Tensor]) -> None:
    use_chunked_loss(model)
    tile_mlps(model, 64, compiled=False, copies={}, autocast=lambda: torch.autocast("cpu", enabled=False))


@pytest.mark.parametrize("change", [as_graph, in_parts])
@pytest.mark.parametrize(
    "name", some_by_day(["pissa", "orthogonal", "lora_fa", "vera", "patterns"], by_day=["lora_fa", "vera"])
)
def test_a_step_of_an_engine_is_that_of_eager(name: str, change: Callable[..., None]) -> None:
    config = tiny_config(**{"rank": 4, **VARIANTS[name]})
    architecture = load_architecture(config.model)
    found = []
    for is_changed in (False, True):
        set_seed(0)
        model = load_model(config, architecture, CPU).train()
        with torch.no_grad():
            for parameter in adapters(model).values():
                parameter.add_(0.02 * torch.randn_like(parameter))
        batch = padded([130, 67], 130)
        if is_changed:
            change(model, batch)
        found.append(loss_and_gradients(model, batch))
    (loss, gradients), (changed_loss, changed_gradients) = found
    assert changed_loss == pytest.approx(loss, rel=1e-5)
    assert furthest(changed_gradients, gradients) < 1e-4


# --- 4 bit


@pytest.fixture
def small_model(tmp_path: Path) -> Path:
    """A model in a folder, whose weights are not alike in all directions."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**SHAPES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand(parameter.shape[-1]) * 4)
    model.save_pretrained(tmp_path / "small")
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def of_folder(folder: Path, **method: Any) -> TrialConfig:
    config = tiny_config(**method)
    config.model = ModelConfig(source=ModelSource.local, path=str(folder))
    config.method.mostly_unquantised = True
    return config


NF4 = {"quantization": Quantization.nf4, "double_quantization": True}


def test_loftq_starts_nearer_to_the_whole_weights_and_goes_with_the_4_bit_ones(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = logits(AutoModelForCausalLM.from_pretrained(small_model))
    config = of_folder(small_model, **NF4, rank=16, init=Init.loftq)
    plain = of_folder(small_model, **NF4, rank=16)
    started, quantised = (
        logits(ready_to_answer(load_model(each, load_architecture(each.model), CPU))) for each in (config, plain)
    )
    assert (started - whole).norm() < 0.8 * (quantised - whole).norm()
    trial = Trial(config, tmp_path / "trial", monkeypatch)
    assert trial.facts["adapters_start"] == "loftq"
    live = logits(trial.model)
    loaded = load_trained(config, tmp_path / "trial" / "adapter", CPU)
    assert torch.allclose(logits(loaded), live, atol=1e-4)
    merged = load_dequantised(config, tmp_path / "trial" / "adapter", CPU).merge_and_unload()
    assert not any(is_quantised(module) for module in merged.modules())
    assert torch.allclose(logits(merged), live, atol=1e-4)


@pytest.mark.parametrize("name", some_by_day(["pissa", "vera"], by_day=["pissa"]))
def test_a_merged_model_is_the_trained_one(
    name: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = of_folder(small_model, **{"rank": 4, **VARIANTS[name]})
    trial = Trial(config, tmp_path / "trial", monkeypatch)
    Merger(config, tmp_path / "trial" / "adapter", lambda _: None).merge(tmp_path / "merged")
    assert torch.allclose(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(trial.model), atol=1e-4
    )


# --- jobs


def job_config(**method: Any) -> TrialConfig:
    config = tiny_config(rank=4, **method)
    config.data.rows, config.data.holdout, config.batch_size = 16, 0.25, 2
    config.train.max_steps, config.train.checkpoint_every, config.train.eval_every = 6, 3.0, 3.0
    return config


@pytest.mark.parametrize(
    "case", some_by_day(["lora_fa", "pissa", "pissa that starts otherwise"], by_day=["pissa that starts otherwise"])
)
def test_a_job_goes_on_from_its_checkpoint(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An iterated decomposition draws random numbers, and another card draws others."""
    config = job_config(**VARIANTS[case.split()[0]])
    whole = Trial(config, tmp_path / "whole", monkeypatch)
    folder = tmp_path / "again"
    shutil.copytree(tmp_path / "whole", folder)
    shutil.rmtree(folder / "checkpoints" / "000006")
    differs = case not in VARIANTS
    if differs:
        monkeypatch.setitem(lora._STARTS, Init.pissa, "pissa_niter_1")
    again = Trial(replace(config, resume=True), folder, monkeypatch)
    steps = [[(e.step, e.loss) for e in of.events if isinstance(e, Step)] for of in (whole, again)]
    assert [step for step, _ in steps[1]] == [4, 5, 6]
    losses = [pytest.approx(loss, abs=1e-4) if differs else loss for _, loss in steps[0][3:]]
    assert [loss for _, loss in steps[1]] == losses
    loaded = load_trained(config, folder / "adapter", CPU)
    assert torch.allclose(logits(loaded), logits(again.model), atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rank", "width"), [(2, 256), (16, 256), (200, 256), (16, 576), (16, 896), (8, 1000)])
@pytest.mark.parametrize("init", [Init.kaiming, Init.gaussian, Init.orthogonal, Init.olora, Init.pissa])
def test_a_start_is_seen_at_any_rank_width_and_format(init: Init, rank: int, width: int, dtype: torch.dtype) -> None:
    """PEFT makes A and B in the frozen weights' format, which may round the largest numbers up."""
    torch.manual_seed(rank)
    asked = LoraConfig(r=rank, target_modules=["0"], init_lora_weights=lora._STARTS.get(init, init.value))
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(width, 320, dtype=dtype)), asked)
    note_start(model, init.takes)
    assert start_of(model).seen == init.name
