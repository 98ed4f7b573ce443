import shlex
from pathlib import Path

import pytest
import yaml

from lora_lab.base_weights import BaseWeights
from lora_lab.store.adapter_card import card, write_card
from lora_lab.store.record import Record

HUB = {"model": "hub", "model.source": "hub", "model.id": "Qwen/Qwen2.5-0.5B-Instruct", "model.weights": "pretrained"}
LOCAL = {"model": "local", "model.source": "local", "model.path": "/home/me/weights", "model.weights": "pretrained"}
COMMAND = (
    "python -m lora_lab model=local model.path=/home/me/weights data.path=mine/rows.jsonl hydra.run.dir=/home/me/out "
    "model.id=Qwen/Qwen2.5-0.5B-Instruct +data.other='/home/me/else' tracking.uri=http://here"
)


def record(params: dict[str, str]) -> Record:
    return Record(
        name="qlora adamw: bf16",
        params=params | {"data": "jsonl", "data.path": "/home/me/mine/rows.jsonl", "learning_rate": "2e-4"},
        outcome="finished",
        tags={"command": COMMAND, "data_digest": "abc", "version.peft": "0.21"},
        metrics={"loss/eval_before": 2.5, "loss/eval": 1.25},
    )


@pytest.mark.parametrize("params", [HUB, LOCAL, {}], ids=["hub", "local", "unknown"])
def test_a_card_says_what_the_adapter_is_and_where_nothing_lies(params: dict[str, str]) -> None:
    text = card(record(params))
    assert "/home/me" not in text
    assert "mine/" not in text
    assert "model.id=Qwen/Qwen2.5-0.5B-Instruct" in text, "a name on the hub is no path"
    for word in ("abc", "2.5000", "1.2500", "2e-4", "rows.jsonl"):
        assert word in text
    head = yaml.safe_load(text.split("---\n")[1])
    assert head.get("base_model") == (HUB["model.id"] if params is HUB else None)


def test_random_weights_have_no_base_model() -> None:
    assert "base_model" not in card(record(HUB | {"model.weights": "random"}))


def test_a_whole_model_is_no_adapter() -> None:
    text = card(record({**HUB, "method.kind": "full"}))
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "transformers"
    assert "All weights of" in text
    assert "adapter" not in text


def test_a_card_holds_no_secret(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    told = record(HUB)
    told.tags["command"] = "python -m lora_lab data.id=https://me:secret@host/data"
    write_card(tmp_path, told)
    assert "secret" not in (tmp_path / "README.md").read_text()


def test_a_path_with_spaces_and_quotes_keeps_its_last_name_alone() -> None:
    told = record(HUB)
    path = "/home/Jane Doe/secret project/rows.jsonl"
    told.params["data.path"] = path
    told.name = f"adamw path={path}"
    told.tags["command"] = "python -m lora_lab " + shlex.quote(f"data.path='{path}'")
    text = card(told)
    assert "Jane" not in text
    assert "secret" not in text
    assert text.count("rows.jsonl") >= 2


def test_a_card_names_the_exact_weights_but_not_where_they_are() -> None:
    weights = BaseWeights(source="local", sha256="5" * 64, folder="/home/me/weights")
    text = card(record(LOCAL), weights)
    assert "5" * 64 in text
    assert "/home/me" not in text
