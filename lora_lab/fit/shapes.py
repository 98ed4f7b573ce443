"""Read a model's shapes: what its layers multiply with, from its transformers config alone."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lab.config import InvalidInput, ModelConfig
from lora_lab.options import ModelSource, Weights

_SEPARATE = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text")
"""Families with q, k, v, o, gate, up and down as linear layers of their own."""
_JOINED = ("phi3",)
"""Families with q, k and v as one linear layer, and gate and up as another."""
_MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
"""Families with experts instead of gate, up and down; qwen2_moe has these as well, for every token."""
_READ_AS_BEFORE = ("mixtral", "qwen3_moe", "olmoe")
"""PEFT maps the names of these to those of transformers 4, where router and experts were linear layers."""
_OWN_WIDTH = ("qwen2_moe", "qwen3_moe")
"""Mixtures that state the width of an expert by itself."""
_KNOWN = (*_SEPARATE, *_JOINED, *_MIXTURES)
_QKV_BIAS = ("qwen2", "qwen2_moe")
_HEAD_NORMS = ("qwen3", "gemma3_text", "qwen3_moe")
_WIDE_NORMS = ("olmoe",)
"""Families that norm q and k over all heads together."""
_FOUR_NORMS = ("gemma2", "gemma3_text")
_TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3_text", "smollm3")
_WINDOWS = {"mistral": 4096, "mixtral": 0, "phi3": 0, "gemma2": 4096, "gemma3_text": 4096}
"""Families whose window slides, and what it is where the config does not say; 0 where it is all."""
_CAPPED_BY_DEFAULT = ("gemma2",)
_NOT_TEXT = ("vision_config", "audio_config")
_INSTEAD = "Run a short trial instead: measure=quick."


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer in a decoder layer."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Return the number of its weights, without the bias."""
        return self.inputs * self.outputs


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of a layer. Each is gate, up and down; transformers keeps them as two stacked weights, of gate and up
    together and of down."""

    count: int
    chosen: int
    """Experts that a token goes through."""
    gate_up: Linear
    """Of one expert, gate and up together."""
    down: Linear
    shared_gate: Linear | None
    """Weighs the MLP that every token goes through, where there is one."""
    is_read_as_before: bool
    """Whether PEFT adapts them as linear layers: then the router is adapted too, and `gate_up` has twice the rank."""
    weighs_in_fp32: bool
    """Whether the router's weights, and with them what comes out of the experts, are in fp32."""

    @property
    def stacks(self) -> tuple[Linear, ...]:
        """Return the shapes of one expert's part of each stack."""
        return (self.gate_up, self.down)

    def rank(self, stack: Linear, rank: int) -> int:
        """Return the rank of one expert's adapter of a stack."""
        return 2 * rank if self.is_read_as_before and stack is self.gate_up else rank


@dataclass(frozen=True, slots=True)
class Shapes:
    """What a decoder-only model consists of. All its decoder layers are alike."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    is_tied: bool
    """Whether the head is the embedding's weights."""
    qkv: tuple[Linear, ...]
    output: Linear
    gate_up: tuple[Linear, ...]
    """Empty in a mixture whose tokens go through experts alone, as is `down`."""
    down: tuple[Linear, ...]
    experts: Experts | None
    layer_norms: int
    """Norms over the hidden size, in each layer."""
    head_norm_weights: int
    """Weights of the norms of q and k, in each layer."""
    caps_scores: bool
    """Whether attention's scores go through a tanh, which no fused kernel for attention calculates."""
    caps_logits: bool
    """Whether logits go through a tanh."""
    window: int | None
    """Tokens that attention looks back at, in some layers or in all."""
    longest: int | None
    """The most positions, where stated."""

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Return a layer's linear layers in the order in which they run, without experts."""
        shared_gate = self.experts.shared_gate if self.experts else None
        found = (*self.qkv, self.output, *self.gate_up, *self.down)
        return found if shared_gate is None else (*found, shared_gate)

    @property
    def query_width(self) -> int:
        """Return query heads x head size."""
        return self.heads * self.head_size

    @property
    def key_width(self) -> int:
        """Return key heads x head size, also the values' width."""
        return self.kv_heads * self.head_size

    @property
    def small_weights(self) -> int:
        """Return the weights of norms, biases and routers, in the whole model."""
        biases = sum(linear.outputs for linear in self.linears if linear.bias)
        router = self.experts.count * self.hidden if self.experts else 0
        layer = self.layer_norms * self.hidden + self.head_norm_weights + biases + router
        return self.layers * layer + self.hidden

    @property
    def parameters(self) -> int:
        """Return the number of frozen weights, tied ones once."""
        tables = (1 if self.is_tied else 2) * self.vocabulary * self.hidden
        layer = sum(linear.weights for linear in self.linears)
        if self.experts:
            layer += self.experts.count * sum(stack.weights for stack in self.experts.stacks)
        return tables + self.layers * layer + self.small_weights


def shapes_of(model: ModelConfig) -> Shapes:
    """Return the shapes of a trial's model.

    Raises: InvalidInput where they are not known here, with what to type instead."""
    fields = model.architecture
    named = fields is not None and (model.weights is Weights.random or model.id is None or "vocab_size" in fields)
    return read_shapes(dict(fields) if named and fields else _read_config(model))


def read_shapes(fields: dict[str, Any]) -> Shapes:
    """Return the shapes that a transformers config states.

    Raises: InvalidInput for a family whose layers are not known here, for weights that are stored quantised, for models
    of more than text, or where a size is missing or is not a positive whole number."""
    fields = _of_text(fields)
    family = str(fields.get("model_type"))
    if family not in _KNOWN:
        raise InvalidInput(
            f"the memory of model_type={family} cannot be calculated: its layers are not known here. Known are "
            f"{', '.join(sorted(_KNOWN))}. {_INSTEAD}"
        )
    hidden, heads = _size(fields, "hidden_size"), _size(fields, "num_attention_heads")
    wide, layers, vocabulary = (_size(fields, k) for k in ("intermediate_size", "num_hidden_layers", "vocab_size"))
    kv_heads = _size(fields, "num_key_value_heads", heads)
    size = _size(fields, "head_dim", hidden // heads)
    if not size:
        raise InvalidInput(f"the model's config has hidden_size={hidden} for num_attention_heads={heads}.")
    query, key = heads * size, kv_heads * size
    biased = family in _QKV_BIAS or bool(fields.get("attention_bias"))
    qkv: tuple[Linear, ...] = (
        Linear("q_proj", hidden, query, biased),
        Linear("k_proj", hidden, key, biased),
        Linear("v_proj", hidden, key, biased),
    )
    experts = _experts(fields, family, hidden, wide) if family in _MIXTURES else None
    if experts:
        wide = _size(fields, "shared_expert_intermediate_size") if experts.shared_gate else 0
    gate_up: tuple[Linear, ...] = (Linear("gate_proj", hidden, wide), Linear("up_proj", hidden, wide))
    if family in _JOINED:
        qkv = (Linear("qkv_proj", hidden, query + 2 * key),)
        gate_up = (Linear("gate_up_proj", hidden, 2 * wide),)
    return Shapes(
        family=family,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        intermediate=wide,
        vocabulary=vocabulary,
        is_tied=bool(fields.get("tie_word_embeddings", family in _TIED_BY_DEFAULT)),
        qkv=qkv,
        output=Linear("o_proj", query, hidden),
        gate_up=gate_up if wide else (),
        down=(Linear("down_proj", wide, hidden),) if wide else (),
        experts=experts,
        layer_norms=4 if family in _FOUR_NORMS else 2,
        head_norm_weights=2 * size if family in _HEAD_NORMS else (query + key) * (family in _WIDE_NORMS),
        caps_scores=bool(fields.get("attn_logit_softcapping", family in _CAPPED_BY_DEFAULT)),
        caps_logits=bool(fields.get("final_logit_softcapping", family in _CAPPED_BY_DEFAULT)),
        window=_size(fields, "sliding_window", _WINDOWS[family]) or None if _slides(fields, family) else None,
        longest=_size(fields, "max_position_embeddings", 0) or None,
    )


def _slides(fields: dict[str, Any], family: str) -> bool:
    """Return whether attention's window slides: a config may say that it does not."""
    return family in _WINDOWS and fields.get("sliding_window", 0) is not None


def _experts(fields: dict[str, Any], family: str, hidden: int, wide: int) -> Experts:
    """Return the experts of a mixture.

    Raises: InvalidInput where a size is missing, or where some layers have none."""
    if fields.get("mlp_only_layers") or fields.get("decoder_sparse_step", 1) != 1:
        raise InvalidInput(
            "the model's config has mlp_only_layers or decoder_sparse_step: the memory of a mixture is calculated only "
            f"where all layers have experts. {_INSTEAD}"
        )
    count = "num_local_experts" if "num_local_experts" in fields else "num_experts"
    own = _size(fields, "moe_intermediate_size") if family in _OWN_WIDTH else wide
    return Experts(
        count=_size(fields, count),
        chosen=_size(fields, "num_experts_per_tok"),
        gate_up=Linear("gate_up_proj", hidden, 2 * own),
        down=Linear("down_proj", own, hidden),
        shared_gate=Linear("shared_expert_gate", hidden, 1) if family == "qwen2_moe" else None,
        is_read_as_before=family in _READ_AS_BEFORE,
        weighs_in_fp32=family == "mixtral",
    )


def _of_text(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the text model, which may be nested."""
    nested = fields.get("text_config", {})
    if not isinstance(nested, dict):
        raise InvalidInput(f"the model's config has text_config={nested}, which does not state any sizes.")
    others = sorted(key for key in fields if key in _NOT_TEXT and fields[key])
    if others:
        raise InvalidInput(
            f"the model's config has {' and '.join(others)}: the memory of what is not text is not calculated here. "
            f"{_INSTEAD}"
        )
    merged = {**fields, **nested}
    if merged.get("quantization_config"):
        raise InvalidInput(
            "the model's weights are stored quantised (quantization_config), and their memory is not calculated here. "
            "Name the model with unquantised weights; method=qlora quantises it while loading."
        )
    return merged


def _size(fields: dict[str, Any], key: str, default: int | None = None) -> int:
    """Return a size; the default where the config has none."""
    found = fields.get(key)
    if found is None and default is not None:
        return default
    if not isinstance(found, int) or found <= 0:
        raise InvalidInput(f"the model's config has {key}={found}, and a positive whole number is needed.")
    return found


def _read_config(model: ModelConfig) -> dict[str, Any]:
    """Read a model's config.json from its folder, or from the hub's local cache. Nothing is downloaded.

    Raises: InvalidInput when it is not there."""
    if model.source is ModelSource.local:
        found: Any = Path(str(model.path)) / "config.json"
        remedy = "Name a folder that has a config.json: model=local model.path=FOLDER."
    else:
        from huggingface_hub import try_to_load_from_cache  # slow to import, and seldom needed

        found = try_to_load_from_cache(str(model.id), "config.json", revision=model.revision)
        remedy = f"Type hf download {model.id} config.json, or choose a named model, for example model=llama3_1_8b."
    if not isinstance(found, str | Path):
        raise InvalidInput(f"the shapes of model.id={model.id} are not in the hub's local cache. {remedy}")
    try:
        return dict(json.loads(Path(found).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as fault:
        raise InvalidInput(f"the model's config cannot be read: {fault}. {remedy}") from fault


def blocks_of(elements: int, block: int) -> int:
    """Return the number of blocks of `block` elements each that hold `elements`."""
    return math.ceil(elements / block)
