"""Train LoRA in all its variants: PEFT's adapters on frozen weights, which may be in 4 bit."""

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, get_peft_model, prepare_model_for_kbit_training
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers.pytorch_utils import Conv1D

from lora_lab.base_weights import ADAPTER
from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.options import Init, MethodKind, ModelSource, Weights
from lora_lab.worker.exact_weights import hub_snapshot
from lora_lab.worker.experts import adapted_experts
from lora_lab.worker.pretrained import model_name
from lora_lab.worker.trainables.loftq import start_from_loss
from lora_lab.worker.trainables.start import load_adapters, note_start, save_adapters
from lora_lab.worker.trainables.tokens import token_ids

_STARTS: dict[Init, Any] = {
    Init.kaiming: True,
    Init.pissa: "pissa_niter_16",  # the first singular vectors by iteration: whole decompositions take minutes a model
    Init.loftq: True,  # until `start_from_loss`
}
"""PEFT's names of starts that are not ours."""

_ADVICE = (".*path_initial_model_for_weight_conversion", ".*low_cpu_mem_usage=False")
"""PEFT's, against what it could not save by itself, and against matrices that are made before their start is known."""


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    with warnings.catch_warnings():
        for each in _ADVICE:
            warnings.filterwarnings("ignore", message=each)
        yield


class Lora:
    """Trains adapters in fp32, and leaves them in PEFT's layout."""

    name = ADAPTER
    dtype = torch.float32
    files = (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME)

    def __init__(self, config: TrialConfig) -> None:
        self._method = config.method
        self._seed = config.seed
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
        self._check_variant(skeleton)
        linear = {n.rsplit(".", 1)[-1] for n, m in skeleton.named_modules() if isinstance(m, torch.nn.Linear)}
        with _without_advice():
            asked = self.adapters(skeleton)
        asked.init_lora_weights = True  # there are no weights to start from
        try:
            with torch.device("meta"):
                get_peft_model(skeleton, asked, low_cpu_mem_usage=True)
            self._freeze_a(skeleton)
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
        with _without_advice():
            asked = self.adapters(model, unreached)
        try:
            with _without_advice():
                adapted = get_peft_model(model, asked)
        except ValueError as error:  # modules were named that lie where text never runs
            raise InvalidInput(f"no adapter can be put into the model ({self._model_name}): {error}") from error
        self.name_base(adapted.peft_config["default"])
        for name, parameter in adapted.named_parameters():
            if "trainable_tokens_delta" in name:  # PEFT makes them in the format of the embeddings
                parameter.data = parameter.data.to(self.dtype)
        if self._method.init is Init.loftq:
            start_from_loss(adapted, self._model)
        note_start(adapted, self._method.init.takes)
        self._freeze_a(adapted)
        return adapted

    def _freeze_a(self, model: Any) -> None:
        for name, parameter in model.named_parameters() if self._method.freeze_a else ():
            if ".lora_A." in name:
                parameter.requires_grad_(False)

    def _check_variant(self, skeleton: Any) -> None:
        """Raise InvalidInput for settings of a variant that this model does not go with."""
        method = self._method
        modules = {name: m for name, m in skeleton.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
        for setting in ("rank_pattern", "alpha_pattern"):
            for named in getattr(method, setting) or ():
                if not any(re.fullmatch(rf"(.*\.)?({named})", name) for name in modules):
                    raise InvalidInput(
                        f"method.{setting} names {named}, and no linear layer of the model ({self._model_name}) ends "
                        f"in that. Name one of {', '.join(sorted({name.rsplit('.', 1)[-1] for name in modules}))}."
                    )
        experts = adapted_experts(skeleton, method)
        is_plain = method.init is Init.kaiming and not method.rank_pattern and not method.alpha_pattern
        if experts and not (is_plain and method.kind is MethodKind.lora):
            raise InvalidInput(
                f"the model ({self._model_name}) is a mixture of experts, whose stacked weights PEFT adapts by plain "
                "LoRA alone. Name linear layers: method.target_modules=[q_proj,k_proj,v_proj,o_proj]."
            )
        if method.init in (Init.pissa, Init.olora, Init.eva):
            self._check_ranks(modules)

    def _check_ranks(self, modules: dict[str, Any]) -> None:
        """Raise InvalidInput for a rank that is above what a weight has directions."""
        method, targets = self._method, [name.rsplit(".", 1)[-1] for name in self._method.target_modules]
        adapted = [
            module
            for name, module in modules.items()
            if targets == ["all-linear"] or name.rsplit(".", 1)[-1] in targets
        ]
        least = min((min(module.weight.shape) for module in adapted), default=method.rank)
        most = max([method.rank, *(method.rank_pattern or {}).values()])
        if most > least:
            raise InvalidInput(
                f"method.init={method.init.name} with rank {most}: a weight of the model ({self._model_name}) has only "
                f"{least} directions to start from. Use method.rank={least} or less."
            )

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
        save_adapters(model, folder)

    def load(self, model: Any, folder: Path) -> None:
        """Copy adapters into the model's."""
        load_adapters(model, folder)

    def adapters(self, model: Any, leave_out: Sequence[str] = ()) -> Any:
        """Make PEFT's config.

        Args:
            leave_out: names of modules that get no adapter, nor do the modules within them.
        """
        method = self._method
        outside = "|".join(re.escape(name) for name in leave_out)
        return LoraConfig(
            target_parameters=adapted_experts(model, method) or None,
            task_type="CAUSAL_LM",
            r=method.rank,
            lora_alpha=method.alpha,
            lora_dropout=method.dropout,
            use_rslora=method.use_rslora,
            use_dora=method.use_dora,
            init_lora_weights=_STARTS.get(method.init, method.init.value),
            eva_config=EvaConfig(rho=1.0) if method.init is Init.eva else None,  # the same rank everywhere
            rank_pattern=dict(method.rank_pattern or {}),
            alpha_pattern=dict(method.alpha_pattern or {}),
            trainable_token_indices=token_ids(method.trained_tokens, self._model) or None,
            target_modules=self._targets(),
            exclude_modules=rf"({outside})(\..*)?" if outside else None,
        )

    def _targets(self) -> Any:
        """Return which modules get an adapter, as PEFT's configs take it."""
        targets = self._method.target_modules
        return "all-linear" if targets == ["all-linear"] else targets
