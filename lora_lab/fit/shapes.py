"""Read a model's shapes: what its layers multiply with, from its transformers config alone."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lab.config import InvalidInput, ModelConfig
from lora_lab.options import ModelSource, Weights

_SEPARATE = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma3_text")
"""Families with q, k, v, o, gate, up and down as linear layers of their own."""
_JOINED = ("phi3",)
"""Families with q, k and v as one linear layer, and gate and up as another."""
_QKV_BIAS = ("qwen2",)
_HEAD_NORMS = ("qwen3", "gemma3_text")
_FOUR_NORMS = ("gemma3_text",)
_TIED_BY_DEFAULT = ("gemma", "gemma3_text", "smollm3")
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
    down: Linear
    layer_norms: int
    """Norms over the hidden size, in each layer."""
    head_norms: int
    """Norms over the head size, in each layer."""
    longest: int | None
    """The most positions, where stated."""

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Return a layer's linear layers in the order in which they run."""
        return (*self.qkv, self.output, *self.gate_up, self.down)

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
        """Return the weights of norms and biases, in the whole model."""
        biases = sum(linear.outputs for linear in self.linears if linear.bias)
        layer = self.layer_norms * self.hidden + self.head_norms * self.head_size + biases
        return self.layers * layer + self.hidden

    @property
    def parameters(self) -> int:
        """Return the number of frozen weights, tied ones once."""
        tables = (1 if self.is_tied else 2) * self.vocabulary * self.hidden
        return tables + self.layers * sum(linear.weights for linear in self.linears) + self.small_weights


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
    if family not in (*_SEPARATE, *_JOINED):
        raise InvalidInput(
            f"the memory of model_type={family} cannot be calculated: its layers are not known here. Known are "
            f"{', '.join(sorted((*_SEPARATE, *_JOINED)))}. {_INSTEAD}"
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
        gate_up=gate_up,
        down=Linear("down_proj", wide, hidden),
        layer_norms=4 if family in _FOUR_NORMS else 2,
        head_norms=2 if family in _HEAD_NORMS else 0,
        longest=_size(fields, "max_position_embeddings", 0) or None,
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
