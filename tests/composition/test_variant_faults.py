"""What a variant of LoRA cannot be together with is refused with what to type, and nothing else is."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_lab.composition.compose import stored_config
from lora_lab.composition.validation import faults
from lora_lab.config import TrialConfig
from lora_lab.options import EngineKind, Init, MethodKind, PlacementKind, Quantization, Weights
from lora_lab.store.record import plain


def config(**settings: Any) -> TrialConfig:
    made = TrialConfig()
    made.optimizer.optim, made.model.id = "adamw_torch", "owner/name"
    made.data.path = "lab_qa.jsonl"
    for key, value in settings.items():
        group, _, name = key.rpartition("__")
        setattr(getattr(made, group) if group else made, name, value)
    return made


NF4 = {"method__quantization": Quantization.nf4}
PISSA = {"method__init": Init.pissa}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({**NF4, **PISSA}, ["method.init=pissa takes its start out", "Use method.init=loftq"]),
        ({**NF4, "method__init": Init.olora}, ["method.init=olora takes its start out", "Use method.init=loftq"]),
        ({**NF4, "method__init": Init.orthogonal}, ["Use method.init=gaussian"]),
        ({"method__init": Init.orthogonal, "method__rank": 3}, ["needs an even rank", "Use method.rank=4"]),
        ({"method__init": Init.orthogonal, "method__rank_pattern": {"q_proj": 3}}, ["needs even ranks", "q_proj: 3"]),
        ({"method__init": Init.eva, "method__rank_pattern": {"q_proj": 3}}, ["Leave method.rank_pattern out"]),
        ({"method__init": Init.loftq}, ["method.quantization=none. Use method=loftq"]),
        ({**NF4, "method__init": Init.loftq, "model__weights": Weights.random}, ["has none", "or method=qlora"]),
        ({**NF4, "method__init": Init.loftq, "engine__host_layers": 1}, ["Use engine.host_layers=0"]),
        ({**PISSA, "method__use_dora": True}, ["with method.use_dora=true", "Use one of them"]),
        ({**PISSA, "method__target_modules": ["lm_head"]}, ["names lm_head", "use method.init=kaiming"]),
        ({"method__freeze_a": True, "method__b_learning_rate_ratio": 4.0}, ["trains no A", "larger learning_rate"]),
        ({"method__rank_pattern": 3}, ["does not give modules a number", "'method.rank_pattern={q_proj: 32}'"]),
        ({"method__rank_pattern": {"q_proj": 0}}, ["gives q_proj the value 0", "greater than 0"]),
        ({"method__rank_pattern": {"q_proj": 1.5}}, ["does not give modules a number"]),
        ({"method__kind": MethodKind.vera, **PISSA}, ["method.init goes with LoRA's two matrices"]),
        ({"method__kind": MethodKind.vera, "method__alpha": 8.0}, ["method.alpha goes with LoRA's two matrices"]),
        ({"method__kind": MethodKind.full, **PISSA}, ["has no effect with method=full"]),
        ({"method__trained_tokens": ["a"], "engine__chunked_loss": True}, ["Use engine.chunked_loss=false"]),
        ({"method__trained_tokens": ["a"], "engine__kind": EngineKind.graph}, ["Use engine=compile"]),
        ({"method__trained_tokens": ["a"], "method__target_modules": ["embed_tokens"]}, ["both train the embeddings"]),
        ({**PISSA, "placement__kind": PlacementKind.fsdp, "placement__workers": 2}, ["Use method.init=kaiming, or pl"]),
        ({"method__init": Init.eva, "placement__kind": PlacementKind.ddp, "placement__workers": 2}, ["placement=one"]),
    ],
)
def test_what_cannot_be_together_is_refused(settings: dict[str, Any], words: list[str]) -> None:
    found = faults(config(**settings))
    assert any(all(word in fault for word in words) for fault in found), found


@pytest.mark.parametrize(
    "settings",
    [
        *({"method__init": init} for init in Init if init is not Init.loftq),
        *({"method__freeze_a": True, "method__init": init} for init in (Init.pissa, Init.eva)),
        *({"engine__kind": kind, "method__kind": MethodKind.vera} for kind in EngineKind),
        *({"engine__kind": kind, "method__freeze_a": True} for kind in EngineKind),
        {**NF4, "method__init": Init.loftq},
        {**NF4, "method__init": Init.eva, "method__b_learning_rate_ratio": 16.0},
        {"method__trained_tokens": ["a"], "engine__host_embeddings": "auto", **PISSA},
        {
            **PISSA,
            "method__use_rslora": True,
            "method__rank_pattern": {"q_proj": 3},
            "placement__kind": PlacementKind.ddp,
        },
    ],
)
def test_what_works_is_not_refused(settings: dict[str, Any]) -> None:
    assert faults(config(**settings)) == []


def test_a_job_from_before_the_ratio_was_a_methods_is_still_read(tmp_path: Path) -> None:
    stored = plain(config())
    del stored["method"]["b_learning_rate_ratio"]
    stored["train"] |= {"max_steps": 3, "lora_plus_ratio": 16.0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored), encoding="utf-8")
    assert stored_config(tmp_path / "config.yaml").method.b_learning_rate_ratio == 16.0
