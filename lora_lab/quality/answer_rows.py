"""The file of a trial's answers: one JSON object a line for each held-out prompt that was answered."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lora_lab.reading import Damaged, lines, parsed, typed

ANSWERS = "answers.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRow:
    """One prompt with its answers: the gold one, the base model's and the tuned model's."""

    prompt: str
    """As the model read it, with the marks of the chat template."""
    gold: str
    base: str
    tuned: str
    base_ended: bool
    """Whether the answer ended its turn, instead of being cut."""
    tuned_ended: bool
    base_tokens: int
    tuned_tokens: int

    def encode(self) -> str:
        """Return the line, without the newline."""
        return json.dumps(asdict(self), ensure_ascii=False)


def read_answers(path: Path) -> tuple[list[AnswerRow], Damaged | None]:
    """Read the rows up to the first damaged line, and what is wrong with that; no rows where there is no file."""
    return lines(path, lambda line: typed(AnswerRow, parsed(line)))


def as_table(rows: list[AnswerRow]) -> dict[str, Any]:
    """Return the rows as MLflow keeps a table: the columns' names, and a list of values for each row."""
    names = [field.name for field in fields(AnswerRow)]
    return {"columns": names, "data": [[getattr(row, name) for name in names] for row in rows]}
