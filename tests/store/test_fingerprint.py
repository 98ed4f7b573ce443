"""What makes two trials the same: every setting that can change a result, and what they ran on."""

import dataclasses
import json
import os
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.config import PackageConfig, TrialConfig
from lora_lab.data_config import SourceConfig
from lora_lab.options import DataSource, ModelSource, PlacementKind, Weights
from lora_lab.placement import Placement
from lora_lab.places_config import PlacementConfig
from lora_lab.store import fingerprint
from lora_lab.store.fingerprint import conditions, digest, point_digest
from lora_lab.telemetry.nvml import Card

CPU = Placement()
CARD = Card(index=0, uuid="GPU-1", name="Card", total_bytes=8 * 2**30, compute_capability=(8, 6), driver="570")


def dataclass_in(hint: Any) -> Any:
    if typing.get_origin(hint) is list:
        return None
    return next((part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)), None)


def leaves(schema: Any = TrialConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of the schema with its type."""
    for field in dataclasses.fields(schema):
        group = dataclass_in(field.type)
        if group:
            yield from leaves(group, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field.type


LEAVES = dict(leaves())


def full() -> TrialConfig:
    """With every block there that can be."""
    config = TrialConfig()
    config.model.package = PackageConfig(name="n", version="1", file="f", sha256="0")
    config.train.max_steps = 10
    return config


def set_to_another(config: TrialConfig, key: str) -> None:
    """Give one setting a value that it does not have."""
    *groups, name = key.split(".")
    node: Any = config
    for group in groups:
        node = getattr(node, group)
    setattr(node, name, another(getattr(node, name), LEAVES[key]))


def another(value: Any, hint: Any) -> Any:
    if isinstance(value, Enum):
        return next(other for other in type(value) if other is not value)
    kinds = [typing.get_origin(part) or part for part in (hint, *typing.get_args(hint))]
    words = [word for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum) for word in kind]
    return words[0] if words else next(KINDS[kind](value) for kind in kinds if kind in KINDS)


KINDS: dict[Any, Any] = {
    bool: lambda value: not value,
    int: lambda value: (value or 0) + 1,
    float: lambda value: (value or 0.0) + 0.5,
    str: lambda value: f"{value}x",
    list: lambda value: [*value, "x"],
    dict: lambda value: {**(value or {}), "x": {"y": 1}},
    Any: lambda value: {**(value or {}), "x": 1},  # patterns, which OmegaConf knows no type for
}


def test_nothing_but_where_how_long_how_often_and_what_is_beside_is_left_out_of_a_points_digest() -> None:
    ignored = set()
    for key in LEAVES:
        changed = full()
        set_to_another(changed, key)
        assert changed != full()
        if point_digest(changed) == point_digest(full()):
            ignored.add(key)
    elsewhere = {key for key in LEAVES if key.startswith(("tracking.", "cluster."))}
    beside = {f"measure.{name}" for name in ("idle_seconds", "board_power_watts", "price_per_kwh", "co2_grams_per_kwh")}
    auto = {"contrast", "margin", "budget_minutes", "first_pairs"}
    assert ignored == elsewhere | beside | auto | {"timeout_minutes", "plan", "repeats", "resume", "placement.kind"}


def test_a_point_is_the_same_on_one_of_several_cards_and_another_on_all_of_them() -> None:
    beside, together = TrialConfig(), TrialConfig()
    beside.placement = PlacementConfig(kind=PlacementKind.each_gpu, gpus=2)
    together.placement = PlacementConfig(kind=PlacementKind.ddp, gpus=2)
    assert point_digest(beside) == point_digest(TrialConfig()) != point_digest(together)


def test_settings_of_a_job_change_nothing_in_a_window() -> None:
    window, job = TrialConfig(), TrialConfig()
    window.train.warmup = 0.5
    assert point_digest(window) == point_digest(TrialConfig())
    job.train.epochs = 1.0
    assert point_digest(job) != point_digest(TrialConfig())


def test_a_package_that_is_named_makes_another_point() -> None:
    assert point_digest(full()) != point_digest(TrialConfig())


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def reversed_keys(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: reversed_keys(node[key]) for key in reversed(node)}
    return [reversed_keys(inner) for inner in node] if isinstance(node, list) else node


@given(content=PLAIN)
def test_a_digest_does_not_depend_on_the_order_of_keys(content: Any) -> None:
    assert digest(content) == digest(reversed_keys(content))
    assert len(digest(content)) == 16


@given(one=PLAIN, other=PLAIN)
def test_other_content_has_another_digest(one: Any, other: Any) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (digest(one) == digest(other)) == same


def config_of(source: DataSource, **data: Any) -> TrialConfig:
    config = TrialConfig()
    config.model.source, config.model.weights = ModelSource.tiny, Weights.random
    config.data.source = source
    for key, value in data.items():
        setattr(config.data, key, value)
    return config


def test_conditions_name_code_versions_and_device() -> None:
    config = config_of(DataSource.random_tokens)
    on_cpu, on_card = conditions(config, CPU), conditions(config, Placement(cards=(CARD,)))
    for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "python", "lora_lab"):
        assert on_cpu[f"version.{name}"]
    assert len(on_cpu["code"]) == 16
    assert on_cpu["device"].startswith("cpu")
    assert (on_card["device"], on_card["device.memory_gib"], on_card["device.driver"]) == ("Card", "8.0", "570")
    assert on_cpu == conditions(config, CPU)


def test_cards_of_one_name_are_one_condition_and_a_share_of_the_cores_is_another() -> None:
    config = config_of(DataSource.random_tokens)
    twin, larger = dataclasses.replace(CARD, uuid="GPU-2"), dataclasses.replace(CARD, total_bytes=2 * CARD.total_bytes)
    one, other, large = (conditions(config, Placement(cards=(card,))) for card in (CARD, twin, larger))
    assert one == other != large
    shares = [conditions(config, Placement(cores=cores)) for cores in ((0, 1), (2, 3), (0,))]
    assert shares[0] == shares[1]
    assert conditions(config, CPU) not in shares
    assert shares[2] != shares[0]


@pytest.mark.parametrize("key", ["code", "version.torch", "version.python", "version.bitsandbytes"])
def test_other_code_or_another_version_are_other_conditions(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    config = config_of(DataSource.random_tokens)
    before, facts = conditions(config, CPU), fingerprint.environment()
    monkeypatch.setattr(fingerprint, "environment", lambda: {**facts, key: "other"})
    assert conditions(config, CPU) == {**before, key: "other"}


def test_what_cannot_change_a_result_is_no_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(DataSource.random_tokens)
    before, facts = conditions(config, CPU), fingerprint.environment()
    others = {"commit": "other", "dirty": "true", "machine.memory_gib": "1", "version.mlflow": "0"}
    monkeypatch.setattr(fingerprint, "environment", lambda: facts | others)
    assert conditions(config, CPU) == before


ROW = '{"instruction": "a", "output": "b"}\n'


def test_conditions_change_with_the_rows_and_not_with_where_they_lie(tmp_path: Path) -> None:
    path, moved = tmp_path / "rows.jsonl", tmp_path / "elsewhere.jsonl"
    path.write_text(ROW)
    config = config_of(DataSource.jsonl, path=str(path))
    before = conditions(config, CPU)
    moved.write_text(ROW)
    assert conditions(config_of(DataSource.jsonl, path=str(moved)), CPU) == before
    path.write_text(ROW.replace("b", "c"))  # as long as it was
    changed = conditions(config, CPU)
    assert {key for key in before if before[key] != changed[key]} == {"data"}
    path.write_text(ROW)
    assert conditions(config, CPU) == before, "the same rows again are the same rows"
    path.unlink()
    assert conditions(config, CPU)["data"] == "missing"


def test_every_source_and_the_held_out_file_are_conditions(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    paths = [tmp_path / "a.jsonl", tmp_path / "folder" / "b.jsonl", tmp_path / "folder" / "c.jsonl", tmp_path / "held"]
    for path in paths:
        path.write_text(ROW)
    sources = [SourceConfig(path=str(path)) for path in (paths[0], tmp_path / "folder")]
    config = config_of(DataSource.file, sources=sources, heldout_path=str(paths[3]))
    before = conditions(config, CPU)
    for path, key in zip(paths, ["data", "data", "data", "data.heldout"], strict=True):
        path.write_text(ROW.replace("b", "c"))
        changed = conditions(config, CPU)
        assert {name for name in before if before[name] != changed[name]} == {key}
        path.write_text(ROW)
    (tmp_path / "folder").rename(tmp_path / "moved")
    config.data.sources[1].path = str(tmp_path / "moved")
    assert conditions(config, CPU) == before
    config.data.sources[1] = SourceConfig(id="me/rows")
    of_hub = conditions(config, CPU)
    config.data.sources[1].revision = "v2"
    for now, then in ((of_hub, before), (conditions(config, CPU), of_hub)):
        assert {name for name in then if then[name] != now[name]} == {"data"}


def test_the_shipped_rows_are_a_condition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(DataSource.shipped)
    before = conditions(config, CPU)
    config.data.path = "lab_chat.jsonl"
    assert conditions(config, CPU)["data"] != before["data"]
    (tmp_path / "rows.jsonl").write_text(ROW)
    monkeypatch.setattr(fingerprint, "shipped_file", lambda _: tmp_path / "rows.jsonl")
    assert conditions(config, CPU)["data"] not in (before["data"], "missing")


def local_model(folder: Path) -> TrialConfig:
    config = config_of(DataSource.random_tokens)
    config.model.source, config.model.weights, config.model.path = ModelSource.local, Weights.pretrained, str(folder)
    return config


@pytest.mark.parametrize("changed", ["config.json", "model.safetensors", "tokenizer.json", "new.json"])
def test_conditions_change_with_a_local_models_files(tmp_path: Path, changed: str) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"0" * 64)
    config = local_model(tmp_path)
    before = conditions(config, CPU)
    assert conditions(config, CPU) == before
    (tmp_path / changed).write_bytes(b"1" * 64)
    now = conditions(config, CPU)
    assert {key for key in before if before[key] != now[key]} == {"model"}


def test_a_local_models_json_counts_by_content_and_its_weights_by_size_and_time(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"0" * 64)
    config = local_model(tmp_path)
    before = conditions(config, CPU)
    for path in tmp_path.glob("*"):
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
        same = conditions(config, CPU) == before
        assert same == (path.suffix == ".json"), path.name
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_shapes_with_random_weights_need_no_folder(tmp_path: Path) -> None:
    config = local_model(tmp_path)
    config.model.weights = Weights.random
    assert "model" not in conditions(config, CPU)


@pytest.mark.parametrize(("kind", "key"), [("models", "model"), ("datasets", "data")])
def test_conditions_change_with_the_commit_that_a_hub_name_means_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, key: str
) -> None:
    """The cache as huggingface_hub lays it out: the tag or branch moves, the name stays."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = config_of(DataSource.random_tokens)
    if key == "data":
        config = config_of(DataSource.hub, id="me/it")
    else:
        config.model.source, config.model.weights, config.model.id = ModelSource.hub, Weights.pretrained, "me/it"
    assert conditions(config, CPU)[key] == "main", "never fetched: nobody here knows the commit"
    refs = tmp_path / f"{kind}--me--it" / "refs"
    refs.mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        (refs / "main").write_text(commit)
        assert conditions(config, CPU)[key] == commit
    node = config.data if key == "data" else config.model
    node.revision = "v1"
    assert conditions(config, CPU)[key] == "v1"
    (refs / "v1").write_text("c" * 40)
    assert conditions(config, CPU)[key] == "c" * 40
