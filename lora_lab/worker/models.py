"""Load the model of a trial: frozen weights, and what the method trains."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from lora_lab.config import ALL, TIED, InvalidInput, ModelConfig, TrialConfig
from lora_lab.method_config import MethodConfig
from lora_lab.options import Checkpointing, DType, ModelSource, Quantization, Weights
from lora_lab.outcome import says_out_of_memory
from lora_lab.worker.checkpoint import (
    check_files,
    check_not_quantised,
    check_quantized_share,
    check_weights_complete,
    fetch_weights,
    make_skeleton,
)
from lora_lab.worker.experts import quantise_experts
from lora_lab.worker.group import Group
from lora_lab.worker.host_layers import check_host_layers, hosting, move_layers
from lora_lab.worker.mlps import check_mlps
from lora_lab.worker.pretrained import from_pretrained, model_name
from lora_lab.worker.probe import judge, look_through
from lora_lab.worker.quantised import quantised_share
from lora_lab.worker.random_weights import random_state
from lora_lab.worker.shards import check_shards, share_out
from lora_lab.worker.trainables import trainable_of
from lora_lab.worker.trainables.trainable import Trainable

_NEED_LAYERS = {
    Checkpointing.selective: "is every other layer",
    Checkpointing.offloaded: "is of all layers but the last",
}


def load_architecture(model: ModelConfig) -> Any:
    """Read the transformers config: stated shapes for random weights, else the file next to the weights."""
    if model.weights is Weights.random:
        fields = dict(model.architecture or {})
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    return from_pretrained(AutoConfig, model, trust_remote_code=model.trust_remote_code)


def check_model(config: TrialConfig, architecture: Any) -> list[str]:
    """Check the model's shapes and files; load no weights.

    Returns: what the user should know.

    Raises: InvalidInput for a model that can't be trained as asked."""
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
            f"{_NEED_LAYERS[config.gradient_checkpointing]}, and the model ({model_name(config.model)}) has one. "
            "Use gradient_checkpointing=full or gradient_checkpointing=none."
        )
    if config.engine.host_embeddings is True and getattr(architecture, "tie_word_embeddings", False):
        raise InvalidInput(TIED)
    check_not_quantised(config, architecture)
    with _conversion_errors():
        skeleton = make_skeleton(config, architecture)
    check_mlps(config, skeleton)
    check_host_layers(config, skeleton)
    check_shards(config, skeleton)
    remarks = []
    if config.model.weights is Weights.pretrained:
        remarks = check_files(config.model, architecture, skeleton)
    trainable_of(config).check(skeleton)
    return remarks


def load_model(
    config: TrialConfig,
    architecture: Any,
    device: torch.device,
    warn: Callable[[str], None] = lambda _: None,
    sharing: Group | None = None,
    trained: Trainable | None = None,
) -> Any:
    """Load the model onto `device`, with what `method` trains of it.

    Args:
        warn: gets what the user should know of the model.
        sharing: the workers that the frozen weights are shared out between; None where this one holds all of them.
        trained: what is trained of it; by default what the config says.

    Raises: InvalidInput when tensors are missing, when the model is not causal, when packed documents see each other,
        or when most weights are not in the format that is asked for.
    """
    dtype, trained = working_dtype(config.precision.dtype, device), trained or trainable_of(config)
    in_parts = sharing is not None
    model = _loaded(config, architecture, device, dtype, trained.loads_in(dtype), warn, in_parts)
    # of nested configs the inner one counts
    model.config.use_cache = model.config.get_text_config().use_cache = False
    for remark in quantise_experts(model, config.method):
        warn(remark)
    for remark in check_quantized_share(config.method, quantised_share(model)):
        warn(remark)
    if sharing is not None:
        share_out(model, sharing, device)
    seen = look_through(model, config, device, dtype)
    for remark in judge(seen, config, model_name(config.model)):
        warn(remark)
    if seen.unreached:
        warn(f"modules that text never reaches are not trained: {', '.join(seen.unreached)}")
    return trained.build(model, seen.unreached)


def _loaded(
    config: TrialConfig,
    architecture: Any,
    device: torch.device,
    working: torch.dtype,
    dtype: torch.dtype,
    warn: Callable[[str], None],
    in_parts: bool,
) -> Any:
    """Load the model with its own or with random weights, quantised tensor by tensor while it is loaded.

    Args:
        working: the format of products.
        dtype: the format of weights that are not quantised.
        in_parts: leave the weights of all layers in host memory, since the device shall never have all of them.
    """
    is_quantised = config.method.quantization is not Quantization.none
    asked: dict[str, Any] = {
        "config": architecture,
        "dtype": dtype,
        "attn_implementation": config.attention.value,
        "device_map": {"": torch.device("cpu") if in_parts and not is_quantised else device},
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # check_weights_complete raises for them, by name
    }
    if getattr(architecture, "quantization_config", None) is None:  # else the files say how
        asked["quantization_config"] = _quantization(config.method, working)
    is_hosted = device.type == "cuda" and config.engine.host_layers
    hosts: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if is_hosted:
        hosts = hosting(config.engine.host_layers)
    elif in_parts and is_quantised:
        hosts = hosting(ALL, lambda weight: weight.cpu())
    with _conversion_errors(), hosts:
        if config.model.weights is Weights.random:
            with torch.device("meta"):
                skeleton = AutoModelForCausalLM.from_config(architecture, dtype=dtype)
            # one tensor after the other: threads would draw the random numbers in another order each time
            with _environment_variable("HF_DEACTIVATE_ASYNC_LOAD", "1"):
                state = random_state(skeleton, device)
                model, info = type(skeleton).from_pretrained(None, state_dict=state, **asked)
        else:
            fetch_weights(config.model)
            if config.model.source is ModelSource.hub:  # check_model saw the files of the others
                check_files(config.model, architecture, make_skeleton(config, architecture))
            asked["trust_remote_code"] = config.model.trust_remote_code
            model, info = from_pretrained(AutoModelForCausalLM, config.model, use_safetensors=True, **asked)
    if is_hosted:
        move_layers(model, config.engine.host_layers)
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
def _conversion_errors() -> Iterator[None]:
    """Raise an out-of-memory error as such. transformers catches every error in a weight's conversion (to 4 bit, say),
    logs it in a report, and raises an error that only points to the report."""
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
        message = next((line.strip() for line in lines if says_out_of_memory(line)), None)
        if message is None:
            raise
        raise RuntimeError(message) from error
    finally:
        logger.removeHandler(keeper)


def working_dtype(precision: DType, device: torch.device) -> torch.dtype:
    """Return the format of weights and products.

    It is the one asked for, but fp16 on a CPU, where fp32 stands in: accelerate has neither autocast nor a GradScaler
    for it there, and on a CPU without fp16 arithmetic one product of the default model's head takes 24 s.
    """
    if precision is DType.fp16 and device.type == "cpu":
        return torch.float32
    dtype: torch.dtype = getattr(torch, precision.value)
    return dtype


def _quantization(method: MethodConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if method.quantization is Quantization.none:
        return None
    # always state the compute dtype: bitsandbytes' default is fp32, and 16-bit inputs do not change it
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=method.quantization.value,
        bnb_4bit_use_double_quant=method.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )
