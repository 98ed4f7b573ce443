import json
from dataclasses import replace

import pytest

from lora_lab.config import TrialConfig
from lora_lab.store import mlflow_names, saved_view
from lora_lab.store.description import description
from lora_lab.store.record import Record, chosen, params

CHOICES = {"optimizer": "adamw", "precision": "bf16", "model": "tiny"}


def record(**changes: object) -> Record:
    config = TrialConfig(seq_len=64, vram_limit_gib=8.0)
    asked = Record(
        name="tiny",
        params=params(config, CHOICES) | {"repeat": "1"},
        chosen=chosen(config, CHOICES, ["optimizer=adamw", "method.rank=8", "+optimizer.args={}"]),
        outcome="finished",
        tags={f"absent.figure/{n}": f"reason {n % 3}" for n in range(150)}
        | {f"ran.fact_{n}": "x" * 20 for n in range(20)}
        | {"outcome": "finished", "device": "cpu", "device.cpu": "EPYC", "warnings": "a | b; c"},
        metrics={"data/rows_read": 4.0, "loss/eval": 1.5, "throughput/tokens_per_second": 1e3},
    )
    return replace(asked, **changes)


@pytest.mark.parametrize("length", [1, 100, 4_000, 8_000])
def test_whatever_is_stored_is_read_back(length: int) -> None:
    wanted = record()
    wanted.params["model.path"] = wanted.tags["ran.odd"] = wanted.tags["absent.odd"] = "\u00e9\n\"'" + "x" * length
    stored = mlflow_names.params(wanted), mlflow_names.tags(wanted), mlflow_names.metrics(wanted)
    assert mlflow_names.read_back(*stored) == (wanted.params, wanted.tags, wanted.metrics)
    shared = [text for key, text in stored[1].items() if key not in wanted.tags]
    assert max(map(len, shared)) <= mlflow_names.LONGEST_TAG


def test_params_are_what_was_chosen() -> None:
    assert set(mlflow_names.params(record())) == {
        *CHOICES,
        *("batch_size", "seq_len", "learning_rate", "repeat"),  # of any trial
        *("method.rank", "optimizer.args"),  # on the command line
        "vram_limit_gib",  # not the default
    }


def test_there_are_few_tags() -> None:
    assert len(mlflow_names.tags(record())) == 7


def test_a_run_of_before_is_read_as_it_is() -> None:
    plain = record(chosen=[])
    tags = {"absent": "a tag of somebody's", "ran": "[1]", "settings": '{"a": 1}', "process": "{", "ran.device": "cpu"}
    metrics = {"step/loss": 1.0, "card/celsius": 40.0}
    assert mlflow_names.read_back(plain.params, tags, metrics) == (plain.params, tags, metrics)
    assert mlflow_names.params(plain) == plain.params


def test_of_a_sweep_that_an_older_version_began_the_newer_process_counts() -> None:
    newer = mlflow_names.tags(record(tags={"process.pid": "2"}))
    for tags in ({"process.pid": "1"} | newer, newer | {"process.pid": "1"}):
        assert mlflow_names.read_back({}, tags, {})[1]["process.pid"] == "2"


def test_the_figures_that_people_look_for_come_first() -> None:
    assert list(mlflow_names.metrics(record())) == ["throughput/tokens_per_second", "loss/eval", "data/rows_read"]


def test_a_description_holds_what_texts_of_others_cannot_break() -> None:
    text = description(record(tags={"outcome": "failed", "reason": "two\nlines <script>", "warnings": "a | b"}))
    assert "<script>" not in text
    assert "two lines" in text.splitlines()[0]


def test_the_saved_view_is_one_that_mlflow_reads() -> None:
    envelope = json.loads(saved_view.value())
    assert isinstance(envelope["name"], str)
    assert isinstance(envelope["createdAt"], int)
    assert json.loads(envelope["state"])["selectedColumns"]
