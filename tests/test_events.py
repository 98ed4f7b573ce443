"""What a worker says survives the pipe, to the last bit."""

import json
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lab import events
from lora_lab.events import Event, Ready, Step, decode, encode
from lora_lab.reading import Damaged
from lora_lab.secrets import without_secrets

KINDS = [kind for kind in vars(events).values() if is_dataclass(kind) and isinstance(kind, type)]
"""Every record of the module, found by looking."""

TEXT = st.text(st.characters(codec=None), max_size=30).filter(lambda text: without_secrets(text) == text)
"""With lone surrogates, which paths and messages of other programs can hold; what looks like a secret is cut out."""

st.register_type_strategy(str, TEXT)


st.register_type_strategy(int, st.integers(-(2**63), 2**63 - 1))
st.register_type_strategy(float, st.floats(-1e11, 1e11))


def anything(kind: Any) -> st.SearchStrategy[Any]:
    """A record with any loss, and times that can be."""
    hints = get_type_hints(kind)
    return st.builds(kind, **{name: st.floats() if name == "loss" else st.from_type(hints[name]) for name in hints})


def test_every_record_is_an_event() -> None:
    assert set(KINDS) == set(Event.__args__)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(data=st.data())
def test_an_event_comes_back_as_it_went(kind: Callable[..., Event], data: st.DataObject) -> None:
    event = data.draw(anything(kind))
    line = encode(event)
    assert "\n" not in line
    assert repr(decode(line)) == repr(event)  # repr, since nan is not equal to itself
    assert repr(decode(line.encode("ascii"))) == repr(event)


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ('{"event": "Ready", "t": 1.0, "pid": 2, "prepared": true}', "rank", 0),
        ('{"event": "Warned", "t": 1.0, "text": "x"}', "rank", 0),
        ('{"event": "Ended", "t": 1.0, "outcome": "finished", "reason": ""}', "rank", 0),
        ('{"event": "WindowOpened", "t": 1.0, "after_step": 2}', "name", "train"),
        ('{"event": "WindowClosed", "t": 1.0, "after_step": 2}', "name", "train"),
    ],
)
def test_older_lines_are_of_one_worker_and_one_window(line: str, field: str, value: object) -> None:
    assert getattr(decode(line), field) == value


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf"), 5e-324, 0.1 + 0.2])
def test_a_loss_keeps_its_every_bit(loss: float) -> None:
    step = Step(t=1.0, step=1, seconds=None, loss=loss, rows=1, slots=8, real=7, trained=3, skipped=False)
    back = decode(encode(step))
    assert isinstance(back, Step)
    assert repr(back.loss) == repr(loss)


@given(event=st.sampled_from(KINDS).flatmap(anything), cut=st.floats(0, 1, exclude_max=True))
def test_a_torn_line_is_never_taken_for_an_event(event: Event, cut: float) -> None:
    line = encode(event)
    with pytest.raises(Damaged, match="no JSON"):
        decode(line[: int(cut * len(line))])


def test_a_line_of_another_version_is_told_from_a_torn_one() -> None:
    ready = json.loads(encode(Ready(t=0.0, pid=1, prepared=True)))
    with pytest.raises(Damaged, match="event"):
        decode(json.dumps(ready | {"event": "Elsewhere"}))
    with pytest.raises(Damaged, match="colour"):
        decode(json.dumps(ready | {"colour": "red"}))


def test_every_field_of_every_event_is_plain_data() -> None:
    for kind in KINDS:
        assert "t" in {field.name for field in fields(kind)}
