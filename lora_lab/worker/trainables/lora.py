"""Train LoRA in all its variants: PEFT's adapters on frozen weights, which may be in 4 bit."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from lora_lab.base_weights import ADAPTER
from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.options import ModelSource, Weights
from lora_lab.worker.exact_weights import hub_snapshot
from lora_lab.worker.experts import adapted_experts
from lora_lab.worker.pretrained import model_name


class Lora:
    """Trains adapters in fp32, and leaves them in PEFT's layout."""

    name = ADAPTER
    dtype = torch.float32
    files = (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME)

    def __init__(self, config: TrialConfig) -> None:
        self._method = config.method
        self._model = config.model
        self._model_name = model_name(config.model)

    def loads_in(self, working: torch.dtype) -> torch.dtype:
        """Return the format of products: frozen weights need no more."""
        return working

    def check(self, skeleton: Any) -> None:
        """Raise InvalidInput for modules that the model does not have, or that PEFT does not adapt in it."""
        there = {n.rsplit(".", 1)[-1] for n, m in skeleton.named_modules() if getattr(m, "weight", None) is not None}
        targets = self._method.target_modules
        named = [] if targets == ["all-linear"] else targets
        missing = [name for name in named if name.rsplit(".", 1)[-1] not in there]
        if missing:
            raise InvalidInput(
                f"method.target_modules names {', '.join(missing)}, which the model ({self._model_name}) does not "
                f"have; it has {', '.join(sorted(there))}."
            )
        linear = {n.rsplit(".", 1)[-1] for n, m in skeleton.named_modules() if isinstance(m, torch.nn.Linear)}
        try:
            with torch.device("meta"):
                get_peft_model(skeleton, self.adapters(skeleton), low_cpu_mem_usage=True)
        except ValueError as error:
            said = re.sub(r"^\[PEFT:[^]]*\] ", "", str(error).splitlines()[0])
            # PEFT puts the module that it can't adapt in quotes
            able = sorted(name for name in linear - {"lm_head"} if f"'{name}'" not in said)
            raise InvalidInput(
                f"PEFT can't adapt the model ({self._model_name}) as asked: {said} Name other modules, for example "
                f"'method.target_modules=[{','.join(able[:4])}]'."
            ) from error

    def build(self, model: Any, unreached: Sequence[str]) -> Any:
        """Freeze the model and put fresh adapters into it, but for modules that text never runs through."""
        if self._method.raise_to_fp32:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        try:
            adapted = get_peft_model(model, self.adapters(model, unreached))
        except ValueError as error:  # modules were named that lie where text never runs
            raise InvalidInput(f"no adapter can be put into the model ({self._model_name}): {error}") from error
        self.name_base(adapted.peft_config["default"])
        return adapted

    def name_base(self, config: Any) -> None:
        """Name the base in adapter_config.json for programs that load an adapter by it alone. A package's weights are
        named by the model on the hub that they were made from; weights.json has them exactly."""
        model = self._model
        is_folder = model.source is ModelSource.local and model.weights is Weights.pretrained
        config.base_model_name_or_path = str(Path(str(model.path)).resolve()) if is_folder else self._model_name
        if model.source is ModelSource.hub and model.weights is Weights.pretrained:
            snapshot = hub_snapshot(model)
            config.revision = model.revision if snapshot is None else snapshot.name

    def write(self, model: Any, folder: Path) -> None:
        """Write the adapters alone, as PEFT reads them."""
        model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)

    def load(self, model: Any, folder: Path) -> None:
        """Copy adapters into the model's."""
        model.load_adapter(str(folder), "default", is_trainable=True)

    def adapters(self, model: Any, leave_out: Sequence[str] = ()) -> LoraConfig:
        """Make PEFT's config.

        Args:
            leave_out: names of modules that get no adapter, nor do the modules within them.
        """
        method = self._method
        everywhere = method.target_modules == ["all-linear"]
        outside = "|".join(re.escape(name) for name in leave_out)
        return LoraConfig(
            target_parameters=adapted_experts(model, method) or None,
            exclude_modules=rf"({outside})(\..*)?" if outside else None,
            task_type="CAUSAL_LM",
            r=method.rank,
            lora_alpha=method.alpha,
            lora_dropout=method.dropout,
            target_modules="all-linear" if everywhere else method.target_modules,
            use_rslora=method.use_rslora,
            use_dora=method.use_dora,
        )
