"""Read from the live objects what actually ran, and compare it with what was asked."""

import time
from collections import Counter
from typing import Any

import torch

from lora_lab.base_weights import ADAPTER
from lora_lab.config import AUTO, TrialConfig
from lora_lab.events import OptimizerMemory
from lora_lab.options import DType, PlacementKind, Quantization
from lora_lab.worker.adamw_8bit import AdamW8bit
from lora_lab.worker.descent import RoundedDescent
from lora_lab.worker.engines.attention_masks import attention_of
from lora_lab.worker.engines.compiled import checkpointing_of
from lora_lab.worker.engines.host_embeddings import place_of_embeddings
from lora_lab.worker.host_layers import layers_in_host_memory
from lora_lab.worker.in_backward import InBackward
from lora_lab.worker.low_rank import Projected
from lora_lab.worker.models import working_dtype
from lora_lab.worker.quantised import is_quantised, quantised_share
from lora_lab.worker.rounding import Rounded
from lora_lab.worker.trainables import trainable_of
from lora_lab.worker.trainables.inspection import adapter_differences, adapter_facts
from lora_lab.worker.trainables.trainable import trained_parameters
from lora_lab.worker.training import optimizer_class, space_of

PAGED_FROM = 100_000
"""bitsandbytes pages the state of parameters with at least this many elements."""

_MOST_HELD = 1.1
"""A worker's part of the frozen weights, over an equal part of them, at most. Norms, and what 4-bit weights are
unpacked with, are whole on each."""

_AUTOCAST = {torch.float32: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}
"""accelerate's name for each."""


def read_back(trainer: Any, kernels: frozenset[str] | None) -> dict[str, str]:
    """Return facts of a trainer that has taken a step, as plain text by name."""
    model = trainer.model
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    defaults = optimizer.defaults
    state = _state_tensors(optimizer)
    trained = trained_parameters(model)
    # an A that is frozen is an adapter's and no weight of the model's
    frozen = [p for name, p in model.named_parameters() if not p.requires_grad and ".lora_" not in name]
    quantised = [m for m in model.modules() if is_quantised(m) and hasattr(m, "compute_dtype")]
    device = trained[0].device
    scaler = trainer.accelerator.scaler
    attention, masks = attention_of(model)
    facts = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        **({"threads": str(torch.get_num_threads())} if device.type == "cpu" else {}),
        "optimizer_class": _class_name(type(optimizer)),
        "optimizer_fused": str(bool(defaults.get("fused"))),
        "optimizer_bits": _bits(optimizer),
        "optimizer_projection": _projection(optimizer),
        "optimizer_rounding": _rounding(optimizer),
        "optimizer_in_backward": str(isinstance(optimizer, InBackward)),
        "optimizer_paged": str(bool(getattr(optimizer, "is_paged", False))),
        "optimizer_state_dtypes": _counted(state),
        "optimizer_state_paged_elements": f"{_paged(state)} of {sum(t.numel() for t in state)}",
        "adapter_dtypes": _counted(trained),
        "weight_dtypes": _counted(frozen),
        **adapter_facts(model, optimizer),
        "trainable_parameters": str(sum(p.numel() for p in trained)),
        "quantization": ", ".join(sorted({m.weight.quant_type for m in quantised})) or "none",
        **({"quantized_share": f"{quantised_share(model, trained):.4f}"} if quantised else {}),
        "double_quantization": str(any(m.weight.quant_state.nested for m in quantised)),
        "quantized_compute_dtype": ", ".join(sorted({_short(m.compute_dtype) for m in quantised})) or "none",
        "attention": attention,
        "attention_masks": masks,
        "attention_kernel": ", ".join(sorted(kernels)) if kernels else "not seen",
        "autocast": str(trainer.accelerator.mixed_precision),
        "grad_scaler": str(scaler is not None and scaler.is_enabled()),
        "gradient_checkpointing": checkpointing_of(model).value,
    }
    if device.type == "cuda":
        facts["segments"] = _segments()
        facts["embeddings"] = place_of_embeddings(model)
        facts["host_layers"] = "{} of {}".format(*layers_in_host_memory(model))
    return facts


def _segments() -> str:
    """Return how memory is taken from the driver: in segments that grow or of fixed size, or by another allocator."""
    backend = torch.cuda.get_allocator_backend()
    if backend != "native":  # it has no segments to look at
        return backend
    return "expandable" if any(each["is_expandable"] for each in torch.cuda.memory_snapshot()) else "fixed"


def optimizer_memory(trainer: Any) -> OptimizerMemory:
    """Measure the optimizer's state in bytes, by where it is held.

    bitsandbytes pages the state of parameters with at least 100,000 elements (Optimizer2State.get_state_buffer);
    such tensors are managed memory. torch's allocator does not count them, and reports them as on the CPU.
    """
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    eligible = [t for p, state in optimizer.state.items() if p.numel() >= PAGED_FROM for t in state.values()]
    every = _state_tensors(optimizer)
    paged = [tensor for tensor in every if getattr(tensor, "is_paged", False)]
    by_id = {id(tensor) for tensor in eligible if torch.is_tensor(tensor)}
    return OptimizerMemory(
        t=time.monotonic(),
        total_bytes=sum(tensor.nbytes for tensor in every),
        eligible_bytes=sum(tensor.nbytes for tensor in every if id(tensor) in by_id),
        paged_bytes=sum(tensor.nbytes for tensor in paged),
        paged_tensors=len(paged),
        is_paged=bool(getattr(optimizer, "is_paged", False)),
    )


def _state_tensors(optimizer: Any) -> list[Any]:
    """List the tensors of the optimizer's state, each once: all parameters share bitsandbytes' quantisation maps."""
    every = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.numel() > 1]
    return list({id(part): part for tensor in every for part in _parts(tensor)}.values())


def _parts(tensor: Any) -> list[Any]:
    """List what a tensor consists of: torchao's hold codes, scales and a map of the codes."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def _bits(optimizer: Any) -> str:
    """Return the bits of the narrowest state: those that bitsandbytes and ours are made with, or torchao's tensors."""
    if isinstance(optimizer, AdamW8bit):
        return "8"
    kinds = {type(t).__name__ for state in optimizer.state.values() for t in state.values()}
    stored = [bits for bits in ("4", "8") if f"OptimState{bits}bit" in kinds]
    return stored[0] if stored else str(getattr(getattr(optimizer, "args", None), "optim_bits", 32))


def _projection(optimizer: Any) -> str:
    """Return how gradients are projected, and those of how many weights; none without a projection."""
    return optimizer.projection if isinstance(optimizer, Projected) else "none"


def _rounding(optimizer: Any) -> str:
    """Return how updates are rounded to the weights' format: at random, by us or by torchao, or to the nearest."""
    is_torchaos = getattr(optimizer, "bf16_stochastic_round", False)
    is_within = isinstance(optimizer, AdamW8bit) and any(
        weight.dtype is torch.bfloat16 for group in optimizer.param_groups for weight in group["params"]
    )
    return "random" if is_torchaos or is_within or isinstance(optimizer, Rounded | RoundedDescent) else "nearest"


def _paged(tensors: list[Any]) -> int:
    return sum(tensor.numel() for tensor in tensors if getattr(tensor, "is_paged", False))


def _counted(tensors: list[Any]) -> str:
    """Count stored elements by dtype, most first: 'uint8 53084160, bfloat16 28312320'."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[_short(tensor.dtype)] += tensor.numel()
    return ", ".join(f"{dtype} {count}" for dtype, count in sizes.most_common()) or "none"


def _class_name(kind: type) -> str:
    return f"{kind.__module__.split('.')[0]}.{kind.__name__}"


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def expected(config: TrialConfig, device: torch.device) -> dict[str, str]:
    """Return the facts that the config asks for on this device, by the same names. transformers' optimizer names say
    'paged', '8bit' and 'fused'."""
    dtype = working_dtype(config.precision.dtype, device)
    quantised = config.method.quantization is not Quantization.none
    asked = {
        "quantization": config.method.quantization.value,
        "double_quantization": str(config.method.double_quantization),
        "quantized_compute_dtype": _short(dtype) if quantised else "none",
        "attention": config.attention.value,
        "gradient_checkpointing": config.gradient_checkpointing.value,
        "engine": config.engine.kind.value,
        "chunked_loss": str(config.engine.chunked_loss),
        "mlp_tile": str(config.engine.mlp_tile),
        "autocast": _AUTOCAST[dtype],
        "grad_scaler": str(dtype is torch.float16),
    }
    if config.placement.world_size > 1:
        asked |= {"world_size": str(config.placement.world_size), "adapters_equal": "True"}
    name, space = config.optimizer.optim, space_of(config)
    asked["optimizer_rounding"] = "random" if config.method.held_in is DType.bf16 else "nearest"
    asked["optimizer_in_backward"] = str(config.optimizer.in_backward)
    asked["optimizer_projection"] = "none" if space is None else space.named
    if config.optimizer.target:
        asked["optimizer_class"] = _class_name(optimizer_class(config.optimizer.target))
    if device.type == "cpu":
        asked["device"] = "cpu"
    elif config.engine.host_embeddings != AUTO:
        asked["embeddings"] = "host" if config.engine.host_embeddings else "card"
    if name:
        asked["optimizer_paged"] = str("paged" in name)
        asked["optimizer_bits"] = next((bits for bits in ("4", "8") if f"{bits}bit" in name), "32")
        asked["optimizer_fused"] = str("fused" in name)
    return asked


def compare(facts: dict[str, str], config: TrialConfig, device: torch.device) -> tuple[list[str], list[str]]:
    """Return differences and stand-ins. A stand-in is one of the two replacements that a CPU is allowed."""
    asked = expected(config, device)
    differences = [f"{key}: asked for {value}, got {facts[key]}" for key, value in asked.items() if facts[key] != value]
    if trainable_of(config).name == ADAPTER:
        differences += adapter_differences(facts, config.method)
    differences += _dtype_differences(facts, config, device)
    differences += [*_host_layers_difference(facts, config), *_held_difference(facts, config)]
    stand_ins = []
    if device.type == "cpu":
        if config.precision.dtype is DType.fp16:
            stand_ins.append("fp16 on a CPU has neither autocast nor GradScaler: fp32 stands in")
        if facts["optimizer_paged"] == "True":
            stand_ins.append("paged optimizer state on a CPU is plain memory")
    return differences, stand_ins


def _dtype_differences(facts: dict[str, str], config: TrialConfig, device: torch.device) -> list[str]:
    found = []
    trained = {item.split()[0] for item in facts["adapter_dtypes"].split(", ")}
    asked = _short(trainable_of(config).dtype)
    if trained != {asked}:
        found.append(f"adapter_dtypes: asked for {asked}, got {facts['adapter_dtypes']}")
    plain = {item.split()[0] for item in facts["weight_dtypes"].split(", ")} - {"uint8", "none"}
    working = _short(working_dtype(config.precision.dtype, device))
    loaded = _short(trainable_of(config).loads_in(working_dtype(config.precision.dtype, device)))
    allowed = {"float32"} if config.method.raise_to_fp32 else {loaded}
    if config.method.quantization is not Quantization.none:
        allowed |= {working}  # bitsandbytes casts the biases of its 4-bit layers back while it runs
    if plain - allowed:
        found.append(f"weight_dtypes: asked for {min(allowed)} where not quantised, got {facts['weight_dtypes']}")
    return found


def _host_layers_difference(facts: dict[str, str], config: TrialConfig) -> list[str]:
    if "host_layers" not in facts:
        return []
    there, _, layers = facts["host_layers"].partition(" of ")
    asked = config.engine.hosted_layers(int(layers))
    return [] if asked == int(there) else [f"host_layers: asked for {asked}, got {there}"]


def _held_difference(facts: dict[str, str], config: TrialConfig) -> list[str]:
    if config.placement.kind is not PlacementKind.fsdp:
        return []
    held, _, whole = facts.get("base_bytes_held", "1 of 1").partition(" of ")
    most = _MOST_HELD / config.placement.world_size
    share = int(held) / int(whole)
    return [] if share <= most else [f"base_bytes_held: asked for a share of {most:.2f} at most, got {share:.2f}"]
