"""What is kept of a trial: everything that was asked, no secret."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.config import TrialConfig
from lora_lab.events import DataCounted, Event, PhaseBegan, Ran, Step
from lora_lab.method_config import OptimizerConfig
from lora_lab.options import DType
from lora_lab.outcome import End, Outcome
from lora_lab.phase import Phase
from lora_lab.reading import typed
from lora_lab.store.record import RUNNING, Point, Record, complete, params, run_name, without_secrets
from lora_lab.telemetry.figures import GIB, Summary
from lora_lab.telemetry.sampler import Sample

CHOICES = {
    "model": "tiny",
    "method": "qlora",
    "optimizer": "adamw",
    "precision": "fp16",
    "engine": "eager",
    "data": "lab_qa",
}
SECRET = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="/@"), min_size=1, max_size=12)


@given(user=SECRET, password=SECRET, host=st.from_regex(r"[a-z]{1,8}(\.[a-z]{2,5}){0,2}(:[0-9]{2,5})?", fullmatch=True))
def test_names_and_passwords_are_cut_out_of_an_address(user: str, password: str, host: str) -> None:
    text = f"tracking.uri=https://{user}:{password}@{host}/path and more"
    assert without_secrets(text) == f"tracking.uri=https://***@{host}/path and more"


def test_a_password_with_an_unescaped_at_sign_is_cut_whole() -> None:
    assert without_secrets("http://me:p@ss@host:5000/x") == "http://***@host:5000/x"


def test_every_address_of_a_text_is_cut() -> None:
    text = "http://a:b@one/ failed, so http://c:d@two/ was asked"
    assert without_secrets(text) == "http://***@one/ failed, so http://***@two/ was asked"


@pytest.mark.parametrize(
    "text", ["http://127.0.0.1:5000", "sqlite:////tmp/a@b/mlflow.db", "owner/name@main", "http://host/path@2", "a@b.c"]
)
def test_what_holds_no_secret_is_left_alone(text: str) -> None:
    assert without_secrets(text) == text


def leaves(node: Any, key: str = "") -> list[tuple[str, Any]]:
    """Paths and values, through dataclasses and dicts."""
    if dataclasses.is_dataclass(node):
        parts = [(f.name, getattr(node, f.name)) for f in dataclasses.fields(node)]
    elif isinstance(node, dict) and node:
        parts = list(node.items())
    else:
        return [(key, node)]
    return [leaf for name, value in parts for leaf in leaves(value, f"{key}.{name}" if key else name)]


def test_no_setting_is_lost_and_every_choice_is_kept() -> None:
    config = TrialConfig(
        optimizer=OptimizerConfig(target="torch.optim.SGD", args={"momentum": 0.9, "nested": {"a": 1}})
    )
    config.model.architecture = {"model_type": "llama", "rope_parameters": {"rope_theta": 1e6}}
    config.precision.dtype = DType.fp16
    kept = params(config, CHOICES)
    assert CHOICES.items() <= kept.items()
    assert set(kept) == set(CHOICES) | {key for key, _ in leaves(config)}
    assert len(kept) == len(CHOICES) + len(leaves(config)), "two settings share a key"
    assert kept["precision.dtype"] == "fp16", "an Enum goes by the name that the command line takes"
    assert kept["optimizer.args.momentum"] == "0.9"
    assert kept["optimizer.args.nested.a"] == "1"
    assert kept["model.architecture.rope_parameters.rope_theta"] == "1000000.0"
    assert all(isinstance(value, str) for value in kept.values())


def test_params_of_two_trials_differ_where_the_trials_do() -> None:
    one, other = TrialConfig(), TrialConfig(learning_rate=1e-5, seq_len=2048)
    changed = {key for key, value in params(other, CHOICES).items() if params(one, CHOICES)[key] != value}
    assert changed == {"learning_rate", "seq_len"}


def test_no_secret_of_an_address_is_among_the_params() -> None:
    config = TrialConfig()
    config.tracking.uri = "https://me:hunter2@mlflow.example/"
    config.model.path = "s3://key:hunter2@bucket/x"
    assert "hunter2" not in json.dumps(params(config, CHOICES))


def test_neighbours_in_a_sweep_have_different_names() -> None:
    names = {
        run_name(TrialConfig(batch_size=b, seq_len=s), CHOICES | {"engine": engine})
        for b in (1, 2)
        for s in (512, 2048)
        for engine in ("eager", "graph", "mine")
    }
    assert len(names) == 12


@pytest.mark.parametrize(
    ("engine", "name"), [("eager", "adamw fp16 2x512 qlora tiny"), ("graph", "adamw fp16 graph 2x512 qlora tiny")]
)
def test_a_name_says_the_engine_where_it_is_not_the_plain_one(engine: str, name: str) -> None:
    assert run_name(TrialConfig(batch_size=2, seq_len=512), CHOICES | {"engine": engine}) == name


def test_a_trial_that_died_in_a_phase_is_completed_with_what_there_is() -> None:
    record = Record(name="r", params={})
    events: list[Event] = [
        PhaseBegan(t=10.0, phase=Phase.data.value),
        DataCounted(
            t=11.0,
            rows_read=5,
            rows_train=3,
            rows_heldout=1,
            rows_truncated=2,
            rows_without_labels=1,
            real=100,
            trained=40,
            digest="d",
        ),
        PhaseBegan(t=12.0, phase=Phase.warm_up.value),
        Ran(t=12.0, facts={"attention": "flash"}, stand_ins=["a", "b"]),
        Step(t=13.0, step=1, seconds=None, loss=2.5, rows=2, slots=64, real=50, trained=20, skipped=False),
        Step(t=13.5, step=2, seconds=0.5, loss=2.0, rows=2, slots=64, real=40, trained=20, skipped=False),
    ]
    samples = [
        Sample(t=10.0 + i, instant_watts=90.0 if i < 1000 else None, average_watts=100.0, used_bytes=GIB)
        for i in range(2001)
    ]
    summary = Summary(metrics={"m": 1.0}, absent={"a": "why"}, warnings=["w"])
    complete(record, End(outcome=Outcome.out_of_memory, reason="full"), events, samples, summary, 1e9)

    assert record.outcome == "out_of_memory"
    assert (
        record.tags.items()
        >= {
            "outcome": "out_of_memory",
            "reason": "full",
            "phase": "warm_up",
            "step": "3",  # the one after the last that was heard of
            "ran.attention": "flash",
            "stand_ins": "a; b",
            "data_digest": "d",
            "absent.a": "why",
            "warnings": "w",
        }.items()
    )
    assert record.ended_ms == 1_000_000_013_500, "its last word, not the moment of writing it down"
    assert record.metrics == {
        "m": 1.0,
        "data/rows_read": 5.0,
        "data/rows_train": 3.0,
        "data/rows_heldout": 1.0,
        "data/rows_truncated": 2.0,
        "data/rows_without_labels": 1.0,
    }
    by_key: dict[str, list[tuple[int, float, int]]] = {}
    for point in record.series:
        by_key.setdefault(point.key, []).append((point.step, point.value, point.t_ms))
    assert by_key["step/loss"] == [(1, 2.5, 1_000_000_013_000), (2, 2.0, 1_000_000_013_500)]
    assert by_key["step/tokens_per_second"] == [(2, 80.0, 1_000_000_013_500)]
    assert 400 <= len(by_key["card/used_gib"]) <= 501
    assert {value for _, value, _ in by_key["card/used_gib"]} == {1.0}
    powers = [(t_ms < 1_000_001_010_000, value) for _, value, t_ms in by_key["card/power_watts"]]
    assert set(powers) == {(True, 90.0), (False, 100.0)}, "the mean of a second only where nothing else was told"


def test_a_trial_that_never_spoke_is_completed_too() -> None:
    record = Record(name="r", params={})
    complete(record, End(outcome=Outcome.killed, reason=""), [], [], Summary(), 0.0)
    assert record.tags["phase"] == "start"
    assert "reason" not in record.tags
    assert "step" not in record.tags
    assert record.series == []


STEPPED: list[Event] = [
    PhaseBegan(t=1.0, phase=Phase.window.value),
    Step(t=2.0, step=7, seconds=0.5, loss=2.0, rows=2, slots=64, real=40, trained=20, skipped=False),
]


@pytest.mark.parametrize(
    ("end", "phase", "step"),
    [
        (End(outcome=Outcome.diverged, reason="r", step=4), Phase.window, "4"),
        (End(outcome=Outcome.killed, reason="r"), Phase.window, "8"),
        (End(outcome=Outcome.killed, reason="r"), Phase.evaluation_after, None),
        (End(outcome=Outcome.finished, reason=""), Phase.window, None),
        (End(outcome=Outcome.finished, reason="", step=4), Phase.window, None),
    ],
)
def test_a_trial_that_did_not_finish_names_its_step(end: End, phase: Phase, step: str | None) -> None:
    record = Record(name="r", params={})
    complete(record, end, [*STEPPED, PhaseBegan(t=3.0, phase=phase.value)], [], Summary(), 0.0)
    assert record.tags.get("step") == step


def test_every_record_has_an_id_of_its_own_and_is_running_until_it_is_over() -> None:
    one, other = Record(name="r", params={}), Record(name="r", params={})
    assert one.id != other.id
    assert (one.outcome, one.ended_ms) == (RUNNING, None)
    assert RUNNING not in {outcome.value for outcome in Outcome}


NUMBERS = st.floats()
INTEGERS = st.integers(-(2**63), 2**63 - 1)
UNIX_MS = st.integers(0, 10**14)
TEXTS = st.text(st.characters(codec=None))
WORDS = st.dictionaries(TEXTS, TEXTS, max_size=4)
POINTS = st.builds(Point, key=TEXTS, value=NUMBERS, step=INTEGERS, t_ms=UNIX_MS)
RECORDS = st.builds(
    Record,
    id=TEXTS,
    parent=st.none() | TEXTS,
    name=TEXTS,
    params=WORDS,
    outcome=TEXTS,
    started_ms=UNIX_MS,
    ended_ms=st.none() | UNIX_MS,
    tags=WORDS,
    metrics=st.dictionaries(TEXTS, NUMBERS, max_size=4),
    series=st.lists(POINTS, max_size=4),
)


@given(record=RECORDS)
def test_a_record_comes_back_from_disk_as_it_went(record: Record) -> None:
    there = json.dumps(dataclasses.asdict(record))
    assert repr(typed(Record, json.loads(there))) == repr(record)  # repr, since nan is not equal to itself
