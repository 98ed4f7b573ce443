"""A model's files: what lacks, does not fit or is packed already is refused by name, before weights are loaded."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from odd_models import NO_SDPA, edit, make, trial
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_lab.config import AUTO, EngineConfig, InvalidInput, TrialConfig
from lora_lab.options import Attention, DType, Quantization
from lora_lab.worker.checkpoint import check_quantized_share
from lora_lab.worker.models import check_model, load_architecture, load_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning"),
]
ARCHITECTURES = ["llama", "llama_tied", "gpt2", "gemma3", "mixtral", "gpt_oss", "granitemoehybrid"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("models")
    for name in ARCHITECTURES:
        make(name, home / name)
    return home


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Any:
    return lambda name: Path(shutil.copytree(made / name, tmp_path / name))


def look(config: TrialConfig) -> list[str]:
    return check_model(config, load_architecture(config.model))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_sound_folder_passes_without_a_word(made: Path, name: str) -> None:
    assert look(trial(name, made / name)) == []


def test_embeddings_that_are_the_head_by_its_config_cannot_leave_the_card(made: Path) -> None:
    for asked in (True, AUTO):
        for name in ("llama", "llama_tied"):
            config = replace(trial(name, made / name), engine=EngineConfig(host_embeddings=asked))
            if asked is True and name == "llama_tied":
                with pytest.raises(InvalidInput, match="tie_word_embeddings"):
                    look(config)
            else:
                assert look(config) == []


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_tensor_that_is_not_there_is_named(copy: Any, name: str) -> None:
    """The last one, one in the middle, and half of them."""
    folder = copy(name)
    kept: dict[str, Any] = {}
    edit(folder, lambda tensors: kept.update(tensors) or tensors)
    names = sorted(kept)
    for gone in (names[-1:], names[len(names) // 2 :][:1], names[::2]):
        edit(folder, lambda _, gone=gone: {n: t for n, t in kept.items() if n not in gone})
        with pytest.raises(InvalidInput, match="lacks") as refusal:
            look(trial(name, folder))
        if "expert" not in gone[0]:  # those are stacked to tensors of other names
            assert gone[0].rsplit(".", 2)[-2] in str(refusal.value)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_tensor_of_another_shape_is_named(copy: Any, name: str) -> None:
    folder = copy(name)

    def longer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: torch.cat([t, t]) if "norm" in n or "ln_" in n else t for n, t in tensors.items()}

    edit(folder, longer)
    with pytest.raises(InvalidInput, match=r"another shape: .*(norm|ln_).* is \[\d+\] and the config says \[\d+\]"):
        look(trial(name, folder))


def test_a_vocabulary_of_another_size_is_named(copy: Any) -> None:
    folder = copy("llama")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 104}))
    with pytest.raises(InvalidInput, match=r"embed_tokens.weight is \[96, 64\] and the config says \[104, 64\]"):
        look(trial("llama", folder))


def test_tensors_that_have_no_place_are_said(copy: Any) -> None:
    folder = copy("llama")
    edit(folder, lambda tensors: tensors | {"model.layers.2.mlp.up_proj.weight": torch.zeros(128, 64)})
    assert ["model.layers.2" in remark for remark in look(trial("llama", folder))] == [True]


@pytest.mark.parametrize("kind", ["pointer", "torn", "empty", "text"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_file_that_is_no_whole_one_is_named(tmp_path: Path, kind: str, sharded: bool) -> None:
    folder = make("llama", tmp_path / "llama", **({"max_shard_size": "20KB"} if sharded else {}))
    file = sorted(folder.glob("*.safetensors"))[-1]
    assert look(trial("llama", folder)) == []
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    content = {"pointer": pointer, "torn": file.read_bytes()[:-8], "empty": b"", "text": b"Not Found"}[kind]
    file.write_bytes(content)
    with pytest.raises(InvalidInput, match=re.escape(file.name)) as refusal:
        look(trial("llama", folder))
    assert ("git lfs pull" if kind == "pointer" else "damaged") in str(refusal.value)


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "llama", max_shard_size="20KB")
    file = sorted(folder.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(InvalidInput, match=re.escape(file.name)):
        look(trial("llama", folder))


@pytest.mark.parametrize("name", NO_SDPA)
def test_a_model_without_an_attention_says_which_it_has(name: str) -> None:
    config = trial(name, target_modules=["in_proj"] if name == "mamba" else ["q_proj"])
    assert look(config) == []
    config.attention = Attention.sdpa
    if AutoModelForCausalLM.from_config(load_architecture(config.model))._supports_sdpa:
        pytest.skip(f"this transformers has sdpa for {name}")
    with pytest.raises(InvalidInput, match="attention=eager"):
        look(config)


def test_what_peft_does_not_adapt_is_refused_with_what_it_does() -> None:
    with pytest.raises(InvalidInput, match=r"method.target_modules=\[dt_proj,in_proj,x_proj\]"):
        look(trial("mamba"))
    assert look(trial("mamba", target_modules=["dt_proj", "in_proj", "x_proj"])) == []


STORED = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (STORED | {"bnb_4bit_compute_dtype": "float32"}, ["method.double_quantization=false"]),
        (STORED | {"bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_use_double_quant": True}, ["precision=bf16"]),
        (STORED | {"bnb_4bit_quant_type": "fp4"}, ["method.quantization=fp4", "method.double_quantization=false"]),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, ["8 bits", "unquantised"]),
        ({"quant_method": "gptq", "bits": 4}, ["gptq", "unquantised"]),
        ({"quant_method": "awq", "bits": 4}, ["awq", "unquantised"]),
        ({"quant_method": "mxfp4"}, ["mxfp4", "unquantised"]),
        ({"quant_method": "fp8"}, ["fp8", "unquantised"]),
    ],
    ids=lambda value: value.get("quant_method") if isinstance(value, dict) else "",
)
def test_weights_that_are_packed_already_say_what_to_type(copy: Any, stored: dict[str, Any], words: list[str]) -> None:
    folder = copy("llama")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": stored}))
    config = trial("llama", folder, quantization=Quantization.nf4, double_quantization=True)
    with pytest.raises(InvalidInput) as refusal:
        look(config)
    assert [word for word in words if word not in str(refusal.value)] == []


def test_weights_that_are_packed_just_as_asked_are_trained(tmp_path: Path) -> None:
    make("llama", tmp_path / "plain")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=four).save_pretrained(
        tmp_path / "packed"
    )
    config = trial("llama", tmp_path / "packed", quantization=Quantization.nf4)
    assert config.precision.dtype is DType.fp32
    assert look(config) == []
    model = load_model(config, load_architecture(config.model), torch.device("cpu"))
    assert {m.weight.quant_type for m in model.modules() if hasattr(getattr(m, "weight", None), "quant_type")} == {
        "nf4"
    }


def test_the_share_in_4_bit_is_warned_of_and_refused_at_its_bounds() -> None:
    method = trial("llama", quantization=Quantization.nf4).method
    assert check_quantized_share(method, 0.9) == []
    assert len(check_quantized_share(method, 0.899)) == 1
    assert len(check_quantized_share(method, 0.5)) == 1
    with pytest.raises(InvalidInput, match=r"method\.mostly_unquantised=true"):
        check_quantized_share(method, 0.499)
    method.mostly_unquantised = True
    assert len(check_quantized_share(method, 0.0)) == 1
    method.quantization = Quantization.none
    assert check_quantized_share(method, 0.0) == []
