"""Load the model that a trial has trained."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from lora_lab.config import InvalidInput, ModelConfig, TrialConfig
from lora_lab.options import MethodKind, ModelSource, Quantization, Weights
from lora_lab.worker.exact_weights import exact_weights, noted_weights
from lora_lab.worker.models import load_architecture, load_model
from lora_lab.worker.quantised import evaluation_mode
from lora_lab.worker.trainables.start import as_saved


def be_quiet() -> None:
    """Keep what libraries say while they load a model from the user's terminal. Errors are still raised."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def this_device() -> torch.device:
    """Return the card that is visible, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def on_its_weights(config: TrialConfig, trained: Path) -> tuple[TrialConfig, str]:
    """Return a config whose base model has the weights that the trial has noted, and why that could not be checked;
    empty where it was. Of a hub model the noted commit is loaded, because a branch moves on.

    Args:
        trained: lies in the folder where the trial notes them.

    Raises: InvalidInput when a folder has other weights now, or is not found from here."""
    _check_found(config)
    noted, model = noted_weights(trained.parent), config.model
    if model.weights is Weights.random:
        return config, ""  # drawn with the seed
    if noted is None:
        return config, "the trial noted no weights"
    if noted.commit:
        return replace(config, model=replace(model, revision=noted.commit)), ""
    if not noted.sha256:
        return config, noted.remark
    try:
        found = exact_weights(model, digest=True)
    except OSError as fault:
        raise InvalidInput(f"the base model's files could not be read: {fault}") from fault
    if found.sha256 and found.named() != noted.named():  # without any file, loading says what is missing
        raise InvalidInput(
            f"the trial began with {noted.named()}, and its base model is now {found.named()}. "
            f"{_changed(noted.files, found.files)}Put those weights back, or train again on these."
        )
    return config, ""


def _check_found(config: TrialConfig) -> None:
    """Raise InvalidInput for a model's folder that is not there; the loader would look for its name on the hub."""
    path = config.model.path
    if config.model.source is ModelSource.local and not (Path(str(path)) / "config.json").is_file():
        remedy = (
            "Put the base model back there."
            if Path(str(path)).is_absolute()
            else "The trial keeps the path as it was typed, so change to the folder where it was started."
        )
        raise InvalidInput(f"model.path={path} holds no config.json (looked in {Path.cwd()}). {remedy}")


def _changed(before: dict[str, str], now: dict[str, str]) -> str:
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return f"These files are not as they were: {', '.join(names)}. " if names else ""


def load_trained(config: TrialConfig, trained: Path, device: torch.device) -> Any:
    """Load what a trial has trained, ready to answer: adapters on the base model as the trial had it, or a whole model.

    Args:
        trained: the folder `adapter` or `model`.

    Raises: InvalidInput when the model cannot be loaded or the adapter is not of this model."""
    if config.method.kind is MethodKind.full:
        own = ModelConfig(source=ModelSource.local, path=str(trained), trust_remote_code=config.model.trust_remote_code)
        return ready_to_answer(load_model(replace(config, model=own), load_architecture(own), device))
    model = load_untrained(replace(config, method=as_saved(config.method)), device)
    try:
        loaded = model.load_adapter(str(trained), "default")
    except (OSError, RuntimeError, ValueError) as fault:
        raise InvalidInput(f"{trained} could not be put on the model: {str(fault).splitlines()[0]}") from fault
    if loaded.unexpected_keys or any(_is_adapters(key) for key in loaded.missing_keys):
        raise InvalidInput(f"{trained} is not of this model: its config was edited, or its files are of another trial.")
    return ready_to_answer(model)


def load_dequantised(config: TrialConfig, trained: Path, device: torch.device) -> Any:
    """Load adapters on the base model's weights as 4 bit has left them, but held in the format of the computation.

    Raises: InvalidInput as `load_trained`."""
    base = load_trained(config, trained, device).unload().dequantize()
    return ready_to_answer(PeftModel.from_pretrained(base, str(trained)))


def _is_adapters(key: str) -> bool:
    return any(part in key for part in ("lora_", "vera_", "trainable_tokens_delta"))


def load_untrained(config: TrialConfig, device: torch.device) -> Any:
    """Load the model as the trial began with it, fresh adapters included."""
    transformers.set_seed(config.seed)  # random weights of a model are drawn with it, as the trial drew them
    return load_model(config, load_architecture(config.model), device)


def ready_to_answer(model: Any) -> Any:
    """Return the model, in evaluation and with a cache."""
    evaluation_mode(model)
    model.config.use_cache = model.config.get_text_config().use_cache = True
    return model


def without_quantisation(config: TrialConfig) -> TrialConfig:
    """Return the config with the base model's weights in the format of the computation instead of 4 bit."""
    method = replace(config.method, quantization=Quantization.none, double_quantization=False, raise_to_fp32=False)
    return replace(config, method=method)
