"""What other trainers call our settings."""

import pytest

from lora_lab.composition.keys import _ELSEWHERE, GROUPS, known_keys, unknown_key


@pytest.mark.parametrize("word", _ELSEWHERE)
def test_a_word_of_another_trainer_leads_to_a_setting_that_exists(word: str) -> None:
    key, _, option = _ELSEWHERE[word].partition("=")
    assert key in (GROUPS if option else known_keys())
    assert f"Did you mean {_ELSEWHERE[word]}?" in unknown_key(word)
    assert word not in known_keys()
