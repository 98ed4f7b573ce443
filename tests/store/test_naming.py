"""A point's name: short, in one order, and never shared."""

from hypothesis import given
from hypothesis import strategies as st

from lora_lab.store.naming import OPTIONS, point_name, trial_name

KEYS = [*OPTIONS, "batch_size", "seq_len", "learning_rate", "data.revision", "model.revision", "method.rank"]
VALUES = st.text("ab1 =x", max_size=3)


def test_what_people_look_for_stands_first_whatever_order_was_asked_for() -> None:
    asked = {"seq_len": "512", "method.rank": "8", "model": "tiny", "batch_size": "1"}
    asked |= {"precision": "bf16", "optimizer": "adamw"}
    assert point_name(asked) == "adamw bf16 1x512 tiny rank=8"
    assert point_name({"batch_size": "1"}) == "batch_size=1"
    assert point_name({"data.revision": "a", "model.revision": "b"}) == "data.revision=a model.revision=b"


def test_the_second_repeat_is_number_two() -> None:
    assert [trial_name("adamw", repeat) for repeat in range(3)] == ["adamw", "adamw #2", "adamw #3"]


@given(st.sets(st.sampled_from(KEYS), min_size=1), st.data())
def test_points_that_differ_in_a_setting_differ_in_name(keys: set[str], data: st.DataObject) -> None:
    words = st.sampled_from(["a", "b", "1", "x1", "true"])
    one, other = ({key: data.draw(words) for key in sorted(keys)} for _ in range(2))
    assert (point_name(one) == point_name(other)) == (one == other) or "x" in "".join([*one.values(), *other.values()])


@given(st.dictionaries(st.sampled_from(KEYS), VALUES))
def test_a_name_is_made_of_any_values(values: dict[str, str]) -> None:
    assert bool(point_name(values)) == bool(values)
