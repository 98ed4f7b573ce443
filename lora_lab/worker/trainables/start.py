"""How adapters start, where that is more than fresh numbers, and how they are then saved.

PiSSA and OLoRA start as a part s B0 A0 of each frozen weight W, which becomes W - s B0 A0. So their A and B mean
nothing next to W. But W + s (B A - B0 A0) is the trained weight too, and B A - B0 A0 is a plain adapter of twice the
rank: [B, -B0] times A on top of A0. In that form they are saved, and anybody can use them with the model as it was.
"""

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, set_peft_model_state_dict
from peft.utils.other import TrainableTokensWrapper, transpose
from safetensors.torch import load_file
from torch import Tensor

from lora_lab.method_config import MethodConfig
from lora_lab.options import Init
from lora_lab.worker.quantised import is_quantised

_ADAPTER = "default"
_NEAR = 1e-2
"""By which products of orthogonal matrices may be off, next to their largest number."""
_ROUNDED = 2**-8
"""The most by which bf16 rounds a number up, as a share of it."""


@dataclass(slots=True)
class Start:
    """How the adapters of one model started."""

    seen: str
    """What their matrices show: the name of an Init."""
    taken: dict[str, tuple[Tensor, Tensor]]
    """A0 and B0 by the layer's name, in host memory; empty where frozen weights are as they were loaded."""


def lora_layers(model: Any) -> dict[str, Any]:
    """Return the layers with a LoRA adapter by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer) and _ADAPTER in m.lora_A}


def note_start(model: Any, takes: bool) -> None:
    """Look at adapters that have just been made, and keep what they have taken out of the frozen weights."""
    layers = lora_layers(model)
    # bitsandbytes may have left some as they were, and LoftQ with them
    in_4_bit = [layer for layer in layers.values() if is_quantised(layer.get_base_layer())]
    first = next(iter(in_4_bit or layers.values()), None)
    seen = "none" if first is None else _seen(*_pair(first), takes)
    model.start = Start(seen, _copies(layers, "cpu") if takes else {})


def start_of(model: Any) -> Start:
    """Return how the adapters started; without LoRA's there is nothing to say."""
    found: Start = getattr(model, "start", None) or Start("none", {})
    return found


def _seen(a: Tensor, b: Tensor, takes: bool) -> str:
    """Name the start that left A (rank, inputs) and B (outputs, rank)."""
    a, b = a.detach().float(), b.detach().float()
    if not b.any():
        if _is_orthonormal(a.t()):
            return Init.eva.name
        bound = 1 / math.sqrt(a.shape[1])
        # PEFT makes A in the format of the frozen weights, and bf16 may round the largest up; a uniform's bound is
        # 1.73 standard deviations
        is_uniform = float(a.abs().max()) <= bound * (1 + _ROUNDED) and bound < 1.9 * float(a.std())
        return Init.kaiming.name if is_uniform else Init.gaussian.name
    if takes:
        return Init.olora.name if _is_orthonormal(b) else Init.pissa.name
    cancelled = float((b @ a).abs().max()) < _NEAR * float(b.abs().max() * a.abs().max())
    return Init.orthogonal.name if cancelled else Init.loftq.name


def _is_orthonormal(columns: Tensor) -> bool:
    identity = torch.eye(columns.shape[1], device=columns.device)
    return bool((columns.t() @ columns - identity).abs().max() < _NEAR)


@contextlib.contextmanager
def before_training(model: Any) -> Iterator[None]:
    """Let the model answer as it did before it was trained."""
    taken = start_of(model).taken
    if not taken:
        with model.disable_adapter():
            yield
        return
    trained = _copies(lora_layers(model))
    tokens = [module for module in model.modules() if isinstance(module, TrainableTokensWrapper)]
    _put(model, taken)
    for each in tokens:
        each.enable_adapters(False)
    try:
        yield
    finally:
        _put(model, trained)
        for each in tokens:
            each.enable_adapters(True)


def _copies(layers: dict[str, Any], device: str | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the present A and B of each layer."""
    found = {}
    for name, layer in layers.items():
        a, b = (each.detach().to(device, copy=True) for each in _pair(layer))
        found[name] = a, b
    return found


def _put(model: Any, pairs: dict[str, Any]) -> None:
    """Copy matrices into the model's own, which an engine may have recorded."""
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            for own, other in zip(_pair(layer), pairs[name], strict=True):
                own.copy_(other)


def as_saved(method: MethodConfig) -> MethodConfig:
    """Return the method whose fresh adapters take what was saved of this one's, on the weights as they are loaded."""
    saved = replace(method, init=Init.kaiming)
    if not method.init.takes:
        return saved
    factor = _alphas(method.use_rslora)
    return replace(
        saved,
        rank=2 * method.rank,
        alpha=factor * method.alpha,
        rank_pattern={name: 2 * rank for name, rank in (method.rank_pattern or {}).items()},
        alpha_pattern={name: factor * alpha for name, alpha in (method.alpha_pattern or {}).items()},
    )


def _alphas(use_rslora: bool) -> float:
    """Return by how much alpha grows with twice the rank, so that the factor on B A stays."""
    return math.sqrt(2) if use_rslora else 2.0


def save_adapters(model: Any, folder: Path) -> None:
    """Write plain adapters for the model as it was loaded, in PEFT's layout.

    Raises: OSError, SafetensorError."""
    before, taken = model.peft_config[_ADAPTER], start_of(model).taken
    config = copy.deepcopy(before)
    config.init_lora_weights = True  # whoever loads them shall not start anything again
    config.eva_config = None
    state = None
    if taken:
        factor = _alphas(config.use_rslora)
        config.r, config.lora_alpha = 2 * config.r, factor * config.lora_alpha
        config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
        config.alpha_pattern = {name: factor * alpha for name, alpha in config.alpha_pattern.items()}
        state = model.state_dict()
        for name, layer in lora_layers(model).items():
            (a, b), (a0, b0) = (each.detach().cpu() for each in _pair(layer)), taken[name]
            state[f"{name}.lora_A.{_ADAPTER}.weight"] = torch.cat([a, a0])
            state[f"{name}.lora_B.{_ADAPTER}.weight"] = torch.cat([b, -b0], 1)
    model.peft_config[_ADAPTER] = config
    try:
        model.save_pretrained(folder, state_dict=state, safe_serialization=True, save_embedding_layers=False)
    finally:
        model.peft_config[_ADAPTER] = before


def load_adapters(model: Any, folder: Path) -> None:
    """Copy saved adapters into the live ones, whose frozen weights lack what these started as.

    A start is calculated again after a restart. On another machine it may be another one: then the frozen weights are
    changed to what the saved adapters were trained on.

    Raises: OSError, SafetensorError."""
    start = start_of(model)
    if not start.taken:
        model.load_adapter(str(folder), _ADAPTER, is_trainable=True)
        return
    saved = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    pairs, taken = {}, {}
    for name in start.taken:
        a, b = saved[f"{name}.lora_A.weight"], saved[f"{name}.lora_B.weight"]
        rank = len(a) // 2
        pairs[name], taken[name] = (a[:rank], b[:, :rank]), (a[rank:], -b[:, rank:])
    _put(model, pairs)
    set_peft_model_state_dict(model, {name: each for name, each in saved.items() if ".lora_" not in name})
    for name, layer in lora_layers(model).items():
        if not all(map(torch.equal, taken[name], start.taken[name])):
            _exchange(layer, start.taken[name], taken[name])
    start.taken = taken


@torch.no_grad()
def _exchange(layer: Any, had: tuple[Tensor, Tensor], has: tuple[Tensor, Tensor]) -> None:
    """Put back what one start has taken out of the frozen weight, and take out that of another."""
    weight = layer.get_base_layer().weight
    (a, b), (other_a, other_b) = had, has
    change = layer.scaling[_ADAPTER] * (b @ a - other_b @ other_a)
    weight.copy_(weight.float() + transpose(change, layer.fan_in_fan_out).to(weight.device))


def _pair(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
