"""When an answer is the gold one, and how sure a share of exact answers is."""

import pytest

from lora_lab.quality.exact_match import matches
from lora_lab.quality.proportion import wilson


@pytest.mark.parametrize(
    ("text", "gold", "same"),
    [
        ("  Yes.\n", "yes", True),
        ("\u00abYES\u00bb", "yes", True),
        ("\uff21\uff22\uff23  one", "abc one", True),
        ("Yes, it is", "yes", False),
        ("don't", "dont", False),
        ("", "yes", False),
        ("So 40 + 2. The answer is 42", "2 + 40 = 42\nThe answer is 42.", True),
        ("42", "The answer is 42.", True),
        ("The answer is 24.", "The answer is 42.", False),
        ("I don't know", "The answer is 42.", False),
        ("the number 42", "42", False),
    ],
)
def test_an_answer_matches(text: str, gold: str, same: bool) -> None:
    assert matches(text, gold) is same


def test_the_interval_of_a_share() -> None:
    """The second is Newcombe's (1998, Two-sided confidence intervals for the single proportion), case 15 of 148."""
    assert wilson(0, 8) == pytest.approx((0.0, 0.3244), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert [wilson(0, count)[0] for count in range(1, 50)] == [0.0] * 49, "and not 2e-17"
    assert wilson(8, 8) == pytest.approx((0.6756, 1.0), abs=1e-4)
    with pytest.raises(ValueError, match="at least one"):
        wilson(0, 0)
