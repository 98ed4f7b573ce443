"""What may not be combined, told before anything starts."""

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.composition.validation import faults
from lora_lab.config import PackageConfig, TrainConfig, TrialConfig
from lora_lab.data_config import DataConfig, MapConfig, SourceConfig
from lora_lab.method_config import OptimizerConfig
from lora_lab.options import (
    Attention,
    Batching,
    Checkpointing,
    DataSource,
    EngineKind,
    ModelSource,
    Quantization,
    Schedule,
    TrackingKind,
    Weights,
)
from lora_lab.reading import typed
from lora_lab.store.record import plain


def sound() -> TrialConfig:
    config = TrialConfig(optimizer=OptimizerConfig(optim="adamw_torch"))
    config.model.id = "owner/name"
    return config


def changed(key: str, value: object) -> TrialConfig:
    config = sound()
    *groups, name = key.split(".")
    node: Any = config
    for group in groups:
        node = getattr(node, group)
    setattr(node, name, value)
    return config


def test_the_config_that_the_other_tests_break_has_no_fault() -> None:
    assert faults(sound()) == []


@pytest.mark.parametrize(
    ("key", "value", "names"),
    [
        ("batch_size", 0, "batch_size=0"),
        ("grad_accum_steps", -1, "grad_accum_steps=-1"),
        ("seq_len", 0, "seq_len=0"),
        ("learning_rate", 0.0, "learning_rate=0.0"),
        ("max_grad_norm", -0.5, "max_grad_norm=-0.5"),
        ("seed", -1, "seed=-1"),
        ("seed", 2**32, "seed=4294967296"),
        ("method.rank", 0, "method.rank=0"),
        ("method.alpha", 0.0, "method.alpha=0.0"),
        ("method.dropout", 1.0, "method.dropout=1.0"),
        ("method.target_modules", [], "method.target_modules"),
        ("method.double_quantization", True, "method.quantization="),
        ("measure.steps", 0, "measure.steps=0"),
        ("measure.warmup_steps", -1, "measure.warmup_steps=-1"),
        ("measure.eval_rows", -1, "measure.eval_rows=-1"),
        ("measure.loss_spike", 0.0, "measure.loss_spike=0.0"),
        ("measure.profile_steps", -1, "measure.profile_steps=-1"),
        ("measure.idle_seconds", -1.0, "measure.idle_seconds=-1.0"),
        ("measure.idle_seconds", math.nan, "measure.idle_seconds=nan"),
        ("measure.idle_seconds", math.inf, "measure.idle_seconds=inf"),
        ("measure.board_power_watts", 0.0, "measure.board_power_watts=0.0"),
        ("measure.board_power_watts", math.inf, "measure.board_power_watts=inf"),
        ("measure.price_per_kwh", math.nan, "measure.price_per_kwh=nan"),
        ("measure.co2_grams_per_kwh", -1.0, "measure.co2_grams_per_kwh=-1.0"),
        ("data.rows", 0, "data.rows=0"),
        ("repeats", 0, "repeats=0"),
        ("repeats", "often", "repeats=often"),
        ("repeats", "auto", "contrast="),
        ("contrast", "optimizer", "repeats=auto"),
        ("margin", "1", "margin=1%"),
        ("margin", "0%", "margin=1%"),
        ("margin", "-1%", "margin=1%"),
        ("margin", "nan%", "margin=1%"),
        ("budget_minutes", 0.0, "budget_minutes=0.0"),
        ("first_pairs", 1, "first_pairs=1"),
        ("timeout_minutes", 0.0, "timeout_minutes=0.0"),
        ("vram_limit_gib", 0.0, "vram_limit_gib=0.0"),
        ("cooldown_celsius", -1.0, "cooldown_celsius=-1.0"),
        ("data.holdout", 0.0, "data.holdout=0.0"),
        ("data.holdout", 1.0, "data.holdout=1.0"),
        ("data.source", DataSource.jsonl, "data.path="),
        ("data.source", DataSource.hub, "data.id="),
        ("data.source", DataSource.random_tokens, "data.rows="),
        ("data.map", MapConfig(instruction="a", output="a"), "the column a twice"),
        ("data.map", MapConfig(instruction="a", text="b"), "data.map names instruction, text"),
        ("optimizer.optim", None, "optimizer=adamw"),
        ("optimizer.target", "torch.optim.SGD", "optimizer.optim=null"),
        ("optimizer.args", {"momentum": 0.9}, "optimizer.target"),
        ("optimizer.weight_decay", -0.1, "optimizer.weight_decay=-0.1"),
        ("model.id", None, "model.id="),
        ("model.id", "a model", "model.id=a model"),
        ("model.id", "https://huggingface.co/Qwen/Qwen2.5-0.5B", "OWNER/NAME"),
        ("model.id", "./mine", "model=local model.path="),
        ("model.id", "Qwen/Qwen2.5--0.5B", "OWNER/NAME"),
        ("model.source", ModelSource.local, "model.path="),
        ("model.source", ModelSource.package, "model.package"),
        ("model.source", ModelSource.tiny, "model.weights=random"),
        ("model.weights", Weights.random, "model.architecture"),
        ("model.trust_remote_code", True, "model.revision="),
        ("model.architecture", {"max_position_embeddings": 511}, "seq_len=511"),
        ("tracking.kind", TrackingKind.server, "tracking.uri="),
        ("tracking.experiment", " ", "tracking.experiment"),
        ("device", "cuda", "device=cuda"),
        ("device", "gpu:", "device=gpu:"),
        ("device", "gpu:0,gpu:1", "device=gpu:0,gpu:1"),
    ],
)
def test_one_wrong_value_is_one_fault_that_says_what_to_type(key: str, value: object, names: str) -> None:
    found = faults(changed(key, value))
    assert len(found) == 1
    assert names in found[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_grad_norm", 0.0),
        ("seed", 2**32 - 1),
        ("measure.warmup_steps", 0),
        ("measure.eval_rows", 0),
        ("measure.profile_steps", 0),
        ("measure.idle_seconds", 0.0),
        ("measure.board_power_watts", 0.01),
        ("method.dropout", 0.999),
        ("repeats", 1),
        ("margin", "0.5 %"),
        ("timeout_minutes", 0.01),
        ("vram_limit_gib", 0.5),
        ("cooldown_celsius", 40.0),
        ("model.architecture", {"max_position_embeddings": 512}),
        ("model.architecture", {"model_type": "llama"}),
        ("device", "cpu"),
        ("device", "gpu:12"),
        ("device", "GPU-0e9f5c1a-7b1f-11ee-b962-0242ac120002"),
    ],
)
def test_what_lies_on_the_right_side_of_an_edge_is_sound(key: str, value: object) -> None:
    assert faults(changed(key, value)) == []


def test_double_quantization_is_sound_with_either_four_bit_format() -> None:
    for quantization in (Quantization.nf4, Quantization.fp4):
        config = changed("method.double_quantization", True)
        config.method.quantization = quantization
        assert faults(config) == []


def job(**train: Any) -> TrialConfig:
    config = sound()
    config.train = TrainConfig(**train)
    return config


@pytest.mark.parametrize(
    ("train", "names"),
    [
        ({"epochs": 1.0, "max_steps": 10}, "train.epochs=1 and train.max_steps=10"),
        ({"max_steps": 10, "warmup": 10}, "train.warmup=10"),
        ({"epochs": 1.0, "warmup": 2.5}, "train.warmup=2.5"),
        ({"epochs": 1.0, "eval_every": 1.5}, "train.eval_every=1.5"),
        ({"epochs": 1.0, "checkpoint_every": 10.5}, "train.checkpoint_every=10.5"),
        ({"epochs": math.inf}, "train.epochs=inf"),
        ({"epochs": 0.0}, "train.epochs=0.0"),
        ({"early_stopping": 3}, "train.epochs or train.max_steps"),
        ({"schedule": Schedule.linear}, "train.epochs or train.max_steps"),
    ],
)
def test_a_job_that_cannot_be_meant_is_one_fault(train: dict[str, Any], names: str) -> None:
    found = faults(job(**train))
    assert len(found) == 1
    assert names in found[0]


@pytest.mark.parametrize(
    "train",
    [
        {"epochs": 0.5},
        {"max_steps": 10, "warmup": 9},
        {"epochs": 3.0, "eval_every": 1.0, "checkpoint_every": 200.0, "warmup": 100},
        {"epochs": 3.0, "early_stopping": 3},
    ],
)
def test_a_job_that_can_be_meant_is_sound(train: dict[str, Any]) -> None:
    assert faults(job(**train)) == []


def test_nothing_stops_early_without_an_evaluation() -> None:
    config = job(epochs=1.0, early_stopping=2)
    config.measure.eval_rows = 0
    assert [fault for fault in faults(config) if "measure.eval_rows=0" in fault] == faults(config) != []


def test_a_capacity_cannot_be_emulated_on_a_card_that_others_fill_too() -> None:
    config = changed("vram_limit_gib", 8.0)
    config.share_device = True
    assert [fault for fault in faults(config) if "share_device" in fault]


def test_every_fault_is_told_at_once() -> None:
    config = changed("batch_size", 0)
    config.device = "tpu"
    config.data.source = DataSource.jsonl
    assert len(faults(config)) == 3


def number_keys(node: Any, prefix: str = "") -> list[tuple[str, type]]:
    """Every number of the schema, with its type."""
    keys: list[tuple[str, type]] = []
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            keys += number_keys(value, f"{prefix}{field.name}.")
        elif field.type in (float, float | None, int, int | None):
            keys.append((prefix + field.name, float if field.type in (float, float | None) else int))
    return keys


NUMBERS = number_keys(sound())
BEYOND_SENSE: dict[type, list[float]] = {
    float: [math.nan, math.inf, -math.inf, 1e300],
    int: [2**31, 10**12, 2**63, 10**40, -(2**63)],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, kind in NUMBERS for value in BEYOND_SENSE[kind]])
def test_a_number_beyond_sense_is_refused_wherever_one_can_be_set(key: str, value: float) -> None:
    if (key, value) == ("seed", 2**31):
        pytest.skip("a seed may be as large as numpy takes it")
    assert any(fault.startswith(f"{key}={value}") for fault in faults(changed(key, value)))


@pytest.mark.parametrize(
    ("key", "value"),
    [("measure.steps", 1_000_000), ("seq_len", 2**20), ("repeats", 1000), ("data.rows", 10**8), ("method.rank", 4096)],
)
def test_what_is_large_and_can_be_meant_is_sound(key: str, value: int) -> None:
    assert faults(changed(key, value)) == []


def test_what_is_too_much_together_is_refused() -> None:
    config = changed("seed", 2**32 - 1)
    config.repeats = 2
    assert "seed=4294967295" in faults(config)[0]
    config = changed("seq_len", 2**24)
    config.batch_size = 100
    assert "batch_size=100" in faults(config)[0]
    config.batch_size, config.data.source, config.data.rows = 1, DataSource.random_tokens, 1000
    assert "data.rows=1000" in faults(config)[0]


@pytest.mark.parametrize(("rows", "refused"), [(1, False), (2, True)])
def test_flash_attention_keeps_packed_documents_apart_in_one_row_only(rows: int, refused: bool) -> None:
    config = changed("batch_size", rows)
    config.attention, config.data.batching = Attention.flash_attention_2, Batching.packed
    assert any("packed documents" in fault for fault in faults(config)) == refused


@pytest.mark.parametrize("checkpointing", list(Checkpointing))
def test_a_graph_has_no_dropout_with_checkpointing(checkpointing: Checkpointing) -> None:
    config = changed("gradient_checkpointing", checkpointing)
    config.engine.kind, config.method.dropout = EngineKind.graph, 0.1
    refused = any("CUDA" in fault and "random numbers twice" in fault for fault in faults(config))
    assert refused == (checkpointing is not Checkpointing.none)


PACKAGE = PackageConfig(name="n", version="1", file="f", sha256="0")


def origin(config: TrialConfig) -> object:
    """What leads to the weights; None when nothing does."""
    model = config.model
    if model.weights is Weights.random:
        return model.architecture
    by_source: dict[ModelSource, object] = {
        ModelSource.hub: model.id,
        ModelSource.local: model.path,
        ModelSource.package: model.package,
    }
    return by_source.get(model.source)


@given(
    source=st.sampled_from(ModelSource),
    weights=st.sampled_from(Weights),
    name=st.sampled_from([None, "owner/name"]),
    path=st.sampled_from([None, "folder"]),
    package=st.sampled_from([None, PACKAGE]),
    architecture=st.sampled_from([None, {"model_type": "llama", "vocab_size": 272}]),
)
def test_a_model_without_fault_says_where_its_weights_come_from(
    source: ModelSource,
    weights: Weights,
    name: str | None,
    path: str | None,
    package: PackageConfig | None,
    architecture: dict[str, Any] | None,
) -> None:
    config = sound()
    config.model = dataclasses.replace(
        config.model, source=source, weights=weights, id=name, path=path, package=package, architecture=architecture
    )
    assert faults(config) or origin(config)


def test_a_config_from_before_other_files_were_read_means_the_same() -> None:
    new = {"config", "split", "sources", "heldout_path", "duplicates", "min_perplexity"}
    stored = {key: value for key, value in plain(TrialConfig())["data"].items() if key not in new}
    read = typed(DataConfig, stored | {"source": "jsonl", "path": "rows.jsonl"})
    assert (read.source, read.sources, read.min_perplexity) == (DataSource.file, [], None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "data.path is missing"),
        ({"sources": [SourceConfig(path="a")], "path": "b"}, "leave data.path out"),
        ({"sources": [SourceConfig(path="a")], "split": "b"}, "leave data.split out"),
        ({"sources": [SourceConfig(path="a", weight=1), SourceConfig(path="b")]}, "others none"),
        ({"sources": [SourceConfig(path="a", weight=0)]}, "data.sources.weight=0 must be greater than 0"),
        ({"sources": [SourceConfig(weight=1)]}, "neither path nor id"),
        ({"sources": [SourceConfig(path="a", id="me/it")]}, "path=a and id=me/it"),
        ({"sources": [SourceConfig(path="a", revision="main")]}, "revision chooses a part"),
        ({"sources": [SourceConfig(path="a"), SourceConfig(id="me/it", config="b")]}, ""),
        ({"sources": [SourceConfig(path="a")], "source": DataSource.hub, "id": "me/it"}, "needs data.source=file"),
        ({"path": "a", "config": "b"}, "data.config=b chooses"),
        ({"source": DataSource.shipped, "split": "test"}, "data.split=test chooses"),
        ({"source": DataSource.random_tokens, "rows": 9, "heldout_path": "b"}, "no effect with random tokens"),
        ({"path": "a", "min_perplexity": 0.5}, "data.min_perplexity=0.5 must be at least 1"),
        ({"sources": [SourceConfig(path="a", weight=1), SourceConfig(path="b", weight=3)]}, ""),
    ],
)
def test_sources_that_cannot_work_are_named(settings: dict[str, Any], words: str) -> None:
    config = sound()
    config.data = dataclasses.replace(config.data, **{"source": DataSource.file, **settings})
    found = faults(config)
    assert (len(found), words in "".join(found)) == (1 if words else 0, True), found


def test_random_weights_know_no_row() -> None:
    config = sound()
    config.data.min_perplexity = 3.0
    assert faults(config) == []
    config.model.source, config.model.weights, config.model.architecture = ModelSource.tiny, Weights.random, {"a": 1}
    assert "knows nothing" in "".join(faults(config))
