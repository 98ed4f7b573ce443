"""An answer counts when its last number is exactly the gold one, however it is written."""

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora_lab
from lora_lab.quality.exact_match import matches
from lora_lab.quality.maths_scorer import last_number, stated_number

DATA = Path(lora_lab.__file__).parent / "dataset" / "data"

numbers = st.decimals(min_value=-(10**9), max_value=10**9, places=2, allow_nan=False)
forms = st.sampled_from(["{:f}", "{:,f}", "{:.4f}", "{:+,.2f}"])
frames = st.sampled_from(
    [
        "{}",
        "The answer is {}.",
        "2 and 2 are 4, so the ANSWER IS: ${}",
        "**{}** apples",
        "So it is {}%",
        "12 - 5 = {}",
        "\\boxed{{{}}}",
        "Answer: {} m2. I used 3 steps!",
        "in 3 steps\n#### {}\n",
    ]
)


def rows_of(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@given(numbers, forms, frames)
def test_one_number_is_found_in_every_form(number: object, form: str, frame: str) -> None:
    text = frame.format(form.format(number))
    assert matches(text, f"The answer is {number}.")
    assert not matches(text, f"The answer is {Fraction(str(number)) + 1}.")


@given(st.integers(1000, 10**12), st.sampled_from([",", "'", "\u2019", "\u00a0", "\u202f"]))
def test_thousands_may_be_separated(number: int, separator: str) -> None:
    assert last_number(f"{number:,}".replace(",", separator) + " pieces") == number


@given(st.text(alphabet="0123456789-+.,/ '$^=x()\n\u2212m"))
def test_no_text_raises(text: str) -> None:
    stated_number(text + "answer is" + text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", None),
        ("none at all, in CO2 or m2 or m^2", None),
        ("7/0", None),
        ("1" * 5000, None),
        ("x=-5", -5),
        ("\u22125", -5),
        ("-$5", -5),
        ("$-5", -5),
        ("9-4", 4),
        ("9 - 4", 4),
        ("(9)-4", 4),
        ("3/4 of it", Fraction(3, 4)),
        ("5cm", 5),
        ("The answer is 12. Do you have 3 more?", 12),
        ("The answer is 12. No, wait: the answer is 13.", 13),
        ("It takes 5 + 7 = 12 days. The answer is clear.", 12),
    ],
)
def test_which_number_a_text_states(text: str, number: Fraction | None) -> None:
    assert stated_number(text) == number


@pytest.mark.parametrize("name", ["maths.jsonl", "maths_test.jsonl"])
def test_every_worked_solution_scores_one(name: str) -> None:
    rows = rows_of(name)
    assert all(matches(f"So it is {row['answer']}.", row["output"]) for row in rows)
    assert all(row["output"].endswith(f"\nThe answer is {row['answer']}.") for row in rows)


def test_answers_of_other_rows_score_as_chance() -> None:
    rows = rows_of("maths_test.jsonl")
    count = len(rows)
    same = Counter(row["answer"] for row in rows)
    chance = sum(n * (n - 1) for n in same.values()) / (count * (count - 1))
    shifts = range(1, count, 10)
    hits = sum(
        matches(row["output"], rows[(index + shift) % count]["output"])
        for shift in shifts
        for index, row in enumerate(rows)
    )
    assert chance == pytest.approx(0.006, abs=0.001)  # data/README.md states it
    assert hits / (count * len(shifts)) == pytest.approx(chance, abs=0.004)


def test_no_question_is_in_both_files() -> None:
    training, test = rows_of("maths.jsonl"), rows_of("maths_test.jsonl")
    assert (len(training), len(test)) == (2000, 300)
    assert len({row["instruction"] for row in training + test}) == 2300
