"""The trials whose memory benchmarks.fit_memory measures: by name the settings of each."""

import random
from itertools import product

COMMON = [
    "model.weights=random",
    "data=random_tokens",
    "data.rows=64",
    "measure.warmup_steps=1",
    "measure.steps=2",
    "measure.eval_rows=0",
    "measure.profile_steps=0",
    "measure.idle_seconds=0",
    "tracking=none",
]

_QWEN3 = [
    "model=qwen2_5_1_5b",
    "model.architecture.model_type=qwen3",
    "model.architecture.hidden_size=2048",
    "model.architecture.intermediate_size=6144",
    "model.architecture.num_attention_heads=16",
    "model.architecture.num_key_value_heads=8",
    "+model.architecture.head_dim=128",
]
_GEMMA3 = [
    "model=llama3_2_1b",
    "model.architecture.model_type=gemma3_text",
    "model.architecture.vocab_size=262144",
    "model.architecture.hidden_size=1152",
    "model.architecture.intermediate_size=6912",
    "model.architecture.num_hidden_layers=26",
    "model.architecture.num_attention_heads=4",
    "model.architecture.num_key_value_heads=1",
    "model.architecture.head_dim=256",
    "model.architecture.tie_word_embeddings=true",
    "~model.architecture.rope_parameters",
]
_MIXTRAL = [
    "model=llama3_1_8b",
    "model.architecture.model_type=mixtral",
    "model.architecture.vocab_size=32000",
    "model.architecture.num_hidden_layers=4",
    "+model.architecture.num_local_experts=8",
    "+model.architecture.num_experts_per_tok=2",
    "~model.architecture.rope_parameters",
]
_QWEN3_MOE = [
    "model=qwen2_5_1_5b",
    "model.architecture.model_type=qwen3_moe",
    "model.architecture.hidden_size=2048",
    "model.architecture.intermediate_size=6144",
    "model.architecture.num_hidden_layers=8",
    "model.architecture.num_attention_heads=32",
    "model.architecture.num_key_value_heads=4",
    "model.architecture.tie_word_embeddings=false",
    "+model.architecture.head_dim=128",
    "+model.architecture.num_experts=128",
    "+model.architecture.num_experts_per_tok=8",
    "+model.architecture.moe_intermediate_size=768",
]
_PHI3 = [
    "model=llama3_2_1b",
    "model.architecture.model_type=phi3",
    "model.architecture.vocab_size=32064",
    "model.architecture.hidden_size=3072",
    "model.architecture.num_hidden_layers=32",
    "model.architecture.num_key_value_heads=32",
    "model.architecture.max_position_embeddings=4096",
    "model.architecture.tie_word_embeddings=false",
    "~model.architecture.head_dim",
    "~model.architecture.rope_parameters",
    "+model.architecture.pad_token_id=32000",
]
_GEMMA2 = [
    "model=llama3_2_1b",
    "model.architecture.model_type=gemma2",
    "model.architecture.vocab_size=256000",
    "model.architecture.hidden_size=2304",
    "model.architecture.intermediate_size=9216",
    "model.architecture.num_hidden_layers=26",
    "model.architecture.num_attention_heads=8",
    "model.architecture.num_key_value_heads=4",
    "model.architecture.head_dim=256",
    "model.architecture.max_position_embeddings=8192",
    "~model.architecture.rope_parameters",
    "attention=eager",
]
MODELS = {
    "smollm2": ["model=smollm2_135m"],
    "qwen2.5": ["model=qwen2_5_1_5b"],
    "llama3.1": ["model=llama3_1_8b"],
    "qwen3": _QWEN3,
    "gemma3": _GEMMA3,
    "gemma2": _GEMMA2,
    "phi3": _PHI3,
    "mixtral": _MIXTRAL,
    "qwen3-moe": _QWEN3_MOE,
}
"""Shapes of 135M, 1.5B, 8B, 1.7B and 1B weights, the last two of other families, with another head size; then of
Gemma 2 2B and Phi-3 mini; of Mixtral 8x7B and Qwen3-30B-A3B a few layers, which fit one card in 16 bit."""

_ENGINES = ("eager", "liger", "compile", "graph")
_SHAPES = (
    ("1x512", "none"),
    ("4x1024", "none"),
    ("2x2048", "full"),
    ("1x8192", "full"),
    ("1x8192", "offloaded"),
)
_FURTHER = {
    "optimizer": (
        ["optimizer=adamw"],
        ["optimizer=adamw_8bit"],
        ["optimizer=paged_adamw"],
        ["optimizer=paged_adamw_32bit"],
        ["optimizer=lion_8bit"],
        ["optimizer=adafactor"],
    ),
    "other": (
        ["precision=fp16"],
        ["method.raise_to_fp32=true"],
        ["method=dora"],
        ["method.dropout=0.1"],
        ["engine.chunked_loss=true"],
        ["gradient_checkpointing=selective"],
        ["batch_size=1", "grad_accum_steps=4"],
        ["data.batching=packed"],
        ["method.target_modules=[q_proj,v_proj]"],
    ),
}
_LONG = (("liger", "full", "1x32768"), ("graph", "offloaded", "1x32768"), ("compile", "offloaded", "1x16384"))


def cases() -> dict[str, list[str]]:
    """Return overrides by name, in a fixed random order: a call that ends early has seen something of everything."""
    found: dict[str, list[str]] = {}

    def add(*named: str) -> None:
        found[" ".join(named)] = _overrides(*named)

    for model, engine, (shape, mode) in product(("smollm2", "qwen2.5", "llama3.1", "qwen3"), _ENGINES, _SHAPES):
        add(model, engine, "qlora", shape, mode)
        if shape in ("1x512", "2x2048"):
            add(model, engine, "lora", shape, mode)
    for engine, (shape, mode) in product(_ENGINES, (("1x512", "none"), ("2x2048", "full"))):
        add("gemma3", engine, "qlora", shape, mode)
    for more in (*_FURTHER["optimizer"], *_FURTHER["other"]):
        add("qwen2.5", "eager", "qlora", "2x1024", "none", *more)
    for engine, rank in product(("eager", "graph"), (8, 64, 128)):
        add("qwen2.5", engine, "qlora", "2x1024", "full", f"method.rank={rank}")
    for engine, mode, shape in _LONG:
        add("qwen2.5", engine, "qlora", shape, mode)
        add("llama3.1", engine, "qlora", shape, mode, "method.rank=32")
    names = list(found)
    random.Random(0).shuffle(names)
    return {name: found[name] for name in names}


def held_out() -> dict[str, list[str]]:
    """Return trials that are unlike those that `lora-lab fit` was written on: other families, DoRA and fp16. They run
    after all others."""
    found: dict[str, list[str]] = {}

    def add(*named: str) -> None:
        found[f"held out {' '.join(named)}"] = _overrides(*named)

    for (shape, mode), method in product((("1x512", "none"), ("2x2048", "full")), ("qlora", "lora")):
        for model in ("phi3", "mixtral", "qwen3-moe", "gemma2"):
            add(model, "eager", method, shape, mode)
        add("gemma3", "eager", method, shape, mode, "+model.architecture.sliding_window=512")
        for engine in ("eager", "liger"):
            add("qwen2.5", engine, method, shape, mode, "method.use_dora=true")
        for engine in ("eager", "liger", "graph"):
            add("qwen2.5", engine, method, shape, mode, "precision=fp16")
    return found


def _overrides(model: str, engine: str, method: str, shape: str, mode: str, *more: str) -> list[str]:
    rows, _, length = shape.partition("x")
    settings = [f"engine={engine}", f"method={method}", f"batch_size={rows}", f"seq_len={length}"]
    return [*MODELS[model], *COMMON, *settings, f"gradient_checkpointing={mode}", *more]


def edges() -> dict[str, list[str]]:
    """Return the trials that are tried at the two ends of their interval, each by itself on the card."""
    shapes = (
        ("qwen2.5", "eager", "1x2048", "full"),
        ("qwen2.5", "liger", "2x2048", "none"),
        ("qwen2.5", "graph", "2x2048", "none"),
        ("qwen2.5", "compile", "4x2048", "full"),
        ("llama3.1", "eager", "1x2048", "full"),
        ("llama3.1", "liger", "1x4096", "full"),
        ("llama3.1", "graph", "1x2048", "offloaded"),
        ("smollm2", "eager", "8x1024", "none"),
    )
    return {
        f"edge {model} {engine} qlora {shape} {mode}": [
            *MODELS[model],
            *COMMON,
            f"engine={engine}",
            "method=qlora",
            f"batch_size={shape.partition('x')[0]}",
            f"seq_len={shape.partition('x')[2]}",
            f"gradient_checkpointing={mode}",
        ]
        for model, engine, shape, mode in shapes
    }
