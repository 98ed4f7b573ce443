"""Small causal language models with adapters, and batches for them."""

import functools
import importlib
import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lora_lab.worker.data import IGNORED

with warnings.catch_warnings():
    # torch's own, while it imports its compiler
    warnings.filterwarnings("ignore", message=".*torch.jit.script_method", category=DeprecationWarning)
    importlib.import_module("lora_lab.worker.engines.engine")
    importlib.import_module("lora_lab.worker.engines.fused_lora_layers")

torch.set_num_threads(1)  # on a machine that is shared, two threads wait for each other longer than they calculate

VOCABULARY = 272
SHAPES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def adapted(
    kind: str = "llama",
    seed: int = 0,
    head: float = 20.0,
    lora: dict[str, Any] | None = None,
    attention: str = "sdpa",
    **own: Any,
) -> Any:
    """A PeftModel in training mode whose adapters already do something.

    Args:
        kind: transformers' model_type.
        head: factor on the head's weights: fresh ones say nearly the same of every token.
        lora: further arguments of LoraConfig.
        own: further fields of the model's config.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SHAPES, **own}), attn_implementation=attention)
    model.config.use_cache = False
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(head)
    asked: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **(lora or {})}
    made = get_peft_model(model, LoraConfig(**asked))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return made.train()


def padded(lengths: list[int], width: int, seed: int = 0) -> dict[str, Tensor]:
    """Rows of these lengths, padded on the right; about a third of each has no label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (len(lengths), width), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
        ids[row, length:] = 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    for row, length in enumerate(lengths):
        labels[row, : length // 3] = IGNORED
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def adapters(model: Any) -> dict[str, Any]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss_and_gradients(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """Of one forward and backward, with nothing left behind."""
    loss = model(**batch).loss
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in adapters(model).items()}
    for parameter in adapters(model).values():
        parameter.grad = None
    return float(loss.detach()), gradients


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference between gradients, as a share of their tensor's largest."""
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).abs().max() / other[n].abs().max().clamp(min=1e-12)) for n in one)


def pack(model: Any, dtype: torch.dtype, nested: bool = True) -> None:
    """Adapted layers in 4 bits that calculate in `dtype`, as PEFT makes them of a model that was loaded so."""
    from bitsandbytes.nn import Linear4bit
    from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit

    for module in model.modules():
        if not hasattr(module, "base_layer"):
            continue
        base, has_bias = module.base_layer, module.base_layer.bias is not None
        new = Linear4bit(base.in_features, base.out_features, has_bias, dtype, nested, quant_type="nf4")
        new.load_state_dict({name: value.float() for name, value in base.state_dict().items()})
        module.base_layer = new.to("cpu").requires_grad_(False)  # packs it
        module.__class__ = PeftLinear4bit


def stepped(model: Any, dtype: torch.dtype) -> Any:
    """A model that trains by its adapted products, in a step that is not recorded."""
    from lora_lab.worker.engines.fused_lora_layers import use_fused_lora
    from lora_lab.worker.engines.graph_step import GraphStep, use_graph_step

    copies = use_fused_lora(model, dtype)
    autocast = functools.partial(torch.autocast, "cpu", dtype, dtype is not torch.float32, cache_enabled=False)
    step = GraphStep(model, autocast, graphs=False, copies=copies)
    use_graph_step(model, step)
    return step


def groups(model: Any) -> list[list[str]]:
    """The names of layers that are calculated together, in the order of the model."""
    names = {module: name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    firsts = [module for module in model.modules() if getattr(module, "others", None)]
    return [[names[layer] for layer in [first, *first.others]] for first in firsts]


def nothing_is_kept(model: Any) -> bool:
    """Whether no layer holds another's result."""
    return all(module.handed is None for module in model.modules() if hasattr(module, "handed"))
