"""What a sweep makes of overrides, and what it hands to each of its trials."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lora_lab.reading import parsed, typed
from lora_lab.store.sweep_folder import Membership
from lora_lab.sweep.points import _product
from lora_lab.sweep.sweeper import _place

PARSER = OverridesParser.create()


@pytest.mark.parametrize(
    ("typed_in", "points"),
    [
        (["a=1"], [["a=1"]]),
        (["a=1,2", "b=x,y"], [["a=1", "b=x"], ["a=1", "b=y"], ["a=2", "b=x"], ["a=2", "b=y"]]),
        (["a=1,2", "b=x", "a=3"], [["a=3", "b=x"]]),
        (["+a=range(1,4)", "~b"], [["+a=1", "~b=null"], ["+a=2", "~b=null"], ["+a=3", "~b=null"]]),
        (["a='1,2'", "b=choice(1,'c d')"], [["a='1,2'", "b=1"], ["a='1,2'", r"b=c\ d"]]),
    ],
)
def test_every_value_meets_every_other_and_the_last_override_of_a_key_counts(
    typed_in: Sequence[str], points: list[list[str]]
) -> None:
    assert _product(PARSER.parse_overrides(list(typed_in))) == points


ODD = ["${seed}", "a\\'b", "$\\{x}", '"', "\\"]
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"])) | st.sampled_from(ODD)


@given(name=TEXT, folder=TEXT)
def test_a_trial_gets_its_place_in_the_sweep_as_it_was_handed_over(name: str, folder: str) -> None:
    member = Membership(name=name, parent="id", number=3, repeat=1, point="p", fingerprint="f")
    place, subdir, handed = PARSER.parse_overrides(_place(Path("/") / f"x{folder}", "0003-2", member))
    assert place.value() == str(Path("/") / f"x{folder}")
    assert subdir.value() == "0003-2"
    arrived = OmegaConf.create({"trial": handed.value()}).trial
    assert typed(Membership, parsed(arrived)) == member
