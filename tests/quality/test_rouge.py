"""ROUGE-L of short answers in every script that has spaces between words."""

import pytest

from lora_lab.quality.rouge import rouge_l

pytest.importorskip("rouge_score")


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("The cat sat.", "the cat sat", 1.0),
        ("the dog sat", "the cat sat", 2 / 3),
        ("sat cat the", "the cat sat", 1 / 3),  # their order counts
        ("nothing else", "the cat sat", 0.0),
        ("", "the cat sat", 0.0),
        ("Кошка спит", "кошка спит!", 1.0),
        ("Кошка спит", "собака ест", 0.0),
        ("बिल्ली सोती है", "बिल्ली खाती है", 2 / 3),
        ("고양이가 잔다", "고양이가 먹는다", 0.5),
        ("", "...", None),
        ("猫が寝る", "猫が寝る", None),
        ("แมวนอน", "แมวนอน", None),
        ("word " * 30, "word " * 30, 1.0),
        ("word " * 31, "word " * 31, None),
    ],
)
def test_a_short_answer_is_scored_by_its_longest_common_sequence_of_words(
    text: str, gold: str, expected: float | None
) -> None:
    assert rouge_l([text], [gold]) == [expected if expected is None else pytest.approx(expected)]
