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
MODELS = {
    "smollm2": ["model=smollm2_135m"],
    "qwen2.5": ["model=qwen2_5_1_5b"],
    "llama3.1": ["model=llama3_1_8b"],
    "qwen3": _QWEN3,
    "gemma3": _GEMMA3,
}
"""Shapes of 135M, 1.5B, 8B, 1.7B and 1B weights; the last two are of other families, with another head size."""

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

    def add(model: str, engine: str, method: str, shape: str, mode: str, *more: str) -> None:
        rows, _, length = shape.partition("x")
        settings = [f"engine={engine}", f"method={method}", f"batch_size={rows}", f"seq_len={length}"]
        name = " ".join([model, engine, method, shape, mode, *more])
        found[name] = [*MODELS[model], *COMMON, *settings, f"gradient_checkpointing={mode}", *more]

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
