"""Check a model's files and shapes before any weight is loaded."""

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM

from lora_lab.config import InvalidInput, ModelConfig, TrialConfig
from lora_lab.method_config import MethodConfig
from lora_lab.options import Attention, MethodKind, ModelSource, Quantization, Weights
from lora_lab.packages import converted_folder

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LFS = b"version https://git-lfs"
_FORMATS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def make_skeleton(config: TrialConfig, architecture: Any) -> Any:
    """Build the model on the meta device: its modules and shapes, without memory.

    Raises: InvalidInput when it does not have the attention that is asked for."""
    wanted: dict[str, Any] = {"trust_remote_code": config.model.trust_remote_code}
    # from_config marks the config that it is given with the attention
    architecture = copy.deepcopy(architecture)
    with torch.device("meta"):
        if config.attention is not Attention.sdpa:  # flash-attn may be missing here: the trial says so
            return AutoModelForCausalLM.from_config(architecture, **wanted, attn_implementation="eager")
        try:
            return AutoModelForCausalLM.from_config(architecture, **wanted, attn_implementation="sdpa")
        except ValueError as error:
            if "attn_implementation" not in str(error) and "attention" not in str(error):
                raise
            raise InvalidInput(
                f"the model ({architecture.model_type}) has no attention=sdpa in transformers. Use attention=eager."
            ) from error


def fetch_weights(model: ModelConfig) -> None:
    """Download the safetensors files of a model on the hub, so that they can be checked before they are loaded. Where
    that is not possible, loading says why."""
    if model.source is not ModelSource.hub:
        return
    names = [_SINGLE]
    with contextlib.suppress(OSError, ValueError):
        try:
            hf_hub_download(str(model.id), _SINGLE, revision=model.revision)
        except EntryNotFoundError:
            index = hf_hub_download(str(model.id), _INDEX, revision=model.revision)
            names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            hf_hub_download(str(model.id), name, revision=model.revision)


def fetch_file(model: ModelConfig, name: str) -> Path | None:
    """Return a file that belongs to the model, downloaded from the hub if need be; None where there is none, or the hub
    is not reached."""
    if model.source is ModelSource.hub:
        with contextlib.suppress(OSError, ValueError, EntryNotFoundError):
            hf_hub_download(str(model.id), name, revision=model.revision)
    return _in_folder(model, name) if model.weights is not Weights.random else None


def weight_files(model: ModelConfig) -> list[Path]:
    """Find the safetensors files that hold a model's weights, as far as they are on this machine.

    Raises: InvalidInput when an index names a file that is not there."""
    first = _in_folder(model, _SINGLE)
    if first is not None:
        return [first]
    index = _in_folder(model, _INDEX)
    if index is None:
        return []
    _check_not_pointer(index)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(f"{index} is damaged ({error}). Fetch it again.") from error
    absent = [file.name for file in files if not file.is_file()]
    if absent and model.source is ModelSource.hub:
        return []  # not downloaded yet
    if absent:
        raise InvalidInput(f"{index} names {_some(absent)}, and there is no such file. Fetch the whole model again.")
    return files


def check_files(model: ModelConfig, architecture: Any, skeleton: Any) -> list[str]:
    """Compare the tensors in a checkpoint with those of the model. transformers itself would fill gaps with random
    weights. Tied weights and buffers that are made while loading are no gaps: transformers decides, on the meta device.

    Returns: what the user should know of tensors that the model has no place for.

    Raises: InvalidInput naming tensors that are missing or have another shape, or a file that is damaged.
    """
    if getattr(architecture, "quantization_config", None) is not None:
        return []  # packed weights have other names and shapes; loading itself is checked
    held: dict[str, torch.Tensor] = {}
    for file in weight_files(model):
        held |= _shapes_in(file)
    if not held:
        return []
    _, info = type(skeleton).from_pretrained(
        None,
        config=copy.deepcopy(architecture),
        state_dict=held,
        device_map={"": "meta"},
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    return check_weights_complete(info)


def check_weights_complete(info: dict[str, Any]) -> list[str]:
    """Judge what transformers reports of a loading. Raise and return as `check_files`."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise InvalidInput(
            f"the checkpoint lacks {len(missing)} tensors of the model: {_some(missing)}. They would be random. "
            "Fetch the whole model again, or use the model that these weights belong to."
        )
    other = sorted(
        f"{name} is {list(there)} and the config says {list(here)}" for name, there, here in info["mismatched_keys"]
    )
    if other:
        raise InvalidInput(
            f"the checkpoint has {len(other)} tensors of another shape: {_some(other)}. "
            "Use the config.json that belongs to these weights."
        )
    unused = sorted(info["unexpected_keys"])
    if unused:
        return [f"the checkpoint has {len(unused)} tensors that the model has no place for: {_some(unused)}"]
    return []


def check_not_quantised(config: TrialConfig, architecture: Any) -> None:
    """Raise InvalidInput when the weights are stored quantised, and not just as the trial asks for them."""
    stored = getattr(architecture, "quantization_config", None)
    if stored is None:
        return
    fields = dict(stored) if isinstance(stored, dict) else stored.to_dict()
    method = str(getattr(fields.get("quant_method"), "value", fields.get("quant_method")))
    if method not in ("bitsandbytes", "QuantizationMethod.BITS_AND_BYTES") or not fields.get("load_in_4bit"):
        kind = "8 bits by bitsandbytes" if fields.get("load_in_8bit") else method
        raise InvalidInput(
            f"the model's weights are stored quantised ({kind}), which is not trained here. Use the model with "
            "unquantised weights; method=qlora quantises it while loading."
        )
    if config.method.kind is MethodKind.full:
        raise InvalidInput(
            "the model's weights are stored in 4 bits, which method=full cannot train. Use the model with unquantised "
            "weights, or method=qlora."
        )
    differing = [f"{key}={value}" for key, value in _as_stored(fields).items() if value != _asked(config)[key]]
    if differing:
        raise InvalidInput(
            f"the model's weights are stored in 4 bits already. Add: {' '.join(differing)}. Or use the model with "
            "unquantised weights."
        )


def _as_stored(fields: dict[str, Any]) -> dict[str, str]:
    """Return the settings under which 4-bit weights were stored, as on the command line."""
    compute = str(fields.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch.")
    return {
        "method.quantization": str(fields.get("bnb_4bit_quant_type", "fp4")),
        "method.double_quantization": str(bool(fields.get("bnb_4bit_use_double_quant"))).lower(),
        "precision": _FORMATS.get(compute, compute),
    }


def _asked(config: TrialConfig) -> dict[str, str]:
    return {
        "method.quantization": config.method.quantization.value,
        "method.double_quantization": str(config.method.double_quantization).lower(),
        "precision": config.precision.dtype.name,
    }


def check_quantized_share(method: MethodConfig, share: float) -> list[str]:
    """Judge the share of the layers' weights that is held in 4 bit.

    Returns: a warning below 90 %.

    Raises: InvalidInput below 50 %, unless asked for by name."""
    if method.quantization is Quantization.none or share >= 0.9:
        return []
    said = f"{share:.0%} of the weights in the model's layers are in 4 bit; bitsandbytes can't quantise the rest"
    if share < 0.5 and not method.mostly_unquantised:
        raise InvalidInput(
            f"{said}, so memory, speed and energy would not be QLoRA's. Use method=lora, another model, or "
            "method.mostly_unquantised=true to measure it all the same."
        )
    return [said]


def _in_folder(model: ModelConfig, name: str) -> Path | None:
    """Find a file of the model on this machine; None where it is not here."""
    if model.source is ModelSource.hub:
        found = try_to_load_from_cache(str(model.id), name, revision=model.revision)
        return Path(found) if isinstance(found, str) else None
    folder = converted_folder(model.package) if model.package else Path(str(model.path))
    return folder / name if (folder / name).is_file() else None


def _shapes_in(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file by name, on the meta device; read the header alone."""
    _check_not_pointer(file)
    try:
        with safe_open(file, "pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118  # no dictionary
    except (SafetensorError, OSError) as error:
        raise InvalidInput(f"{file} is damaged, or was not fetched whole ({error}). Fetch it again.") from error
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _check_not_pointer(file: Path) -> None:
    with file.open("rb") as opened:
        if opened.read(len(_LFS)) == _LFS:
            raise InvalidInput(f"{file} is a git-lfs pointer, not the file itself. In its folder, type: git lfs pull")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
