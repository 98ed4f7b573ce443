"""Rows of text: read, checked and split, before any tokenizer or model is loaded."""

import json
import random
import shlex
from dataclasses import dataclass
from pathlib import Path

from lora_lab.config import ColumnsConfig, RefusedInput

SHIPPED = Path(__file__).resolve().parent / "data" / "lab_qa.jsonl"
_SPLIT_SEED = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One question and its answer."""

    prompt: str
    response: str


def read_jsonl(path: Path, columns: ColumnsConfig, limit: int | None = None) -> list[Row]:
    """Read rows from a file with one JSON object a line; blank lines are skipped.

    Raises: RefusedInput naming the lines that are broken or lack a column, or that the file is empty.
    """
    if not path.is_file():
        raise RefusedInput(f"data.path={path}: there is no such file (looked in {Path.cwd()}). Give a jsonl file.")
    rows: list[Row] = []
    broken: list[str] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if limit is not None and len(rows) + len(broken) >= limit:
                break
            if not line.strip():
                continue
            try:
                rows.append(row_of(json.loads(line.decode("utf-8-sig")), columns))
            except UnicodeDecodeError as error:
                raise RefusedInput(
                    f"data.path={path} is not UTF-8 text (line {number}: {error.reason}). Convert it, for example:\n"
                    f"  iconv -f LATIN1 -t UTF-8 {shlex.quote(str(path))} > utf8.jsonl"
                ) from error
            except json.JSONDecodeError as error:
                broken.append(f"line {number}: not JSON ({error.msg} at column {error.colno})")
            except RefusedInput as error:
                broken.append(f"line {number}: {error}")
    if broken:
        shown = "\n  ".join(broken[:5])
        more = f"\n  and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise RefusedInput(f"data.path={path} has {len(broken)} broken line(s):\n  {shown}{more}")
    if not rows:
        raise RefusedInput(f"data.path={path} is empty; it needs one JSON object a line.")
    return rows


def row_of(fields: object, columns: ColumnsConfig) -> Row:
    """Turn one record into a row: the instruction, then the optional input after a blank line.

    Raises: RefusedInput when it is no object, lacks a column, or a column holds something other than text.
    """
    if not isinstance(fields, dict):
        raise RefusedInput(f"expected a JSON object, found {type(fields).__name__}")
    missing = [name for name in (columns.instruction, columns.output) if name not in fields]
    if missing:
        raise RefusedInput(
            f"no column {' and no column '.join(missing)}; found {', '.join(map(str, fields)) or 'none'}. "
            "Name yours with data.columns.instruction=... data.columns.output=..."
        )
    texts = [fields[columns.instruction], fields.get(columns.input) or "", fields[columns.output]]
    if not all(isinstance(text, str) for text in texts):
        raise RefusedInput("instruction, input and output must be text")
    instruction, context, output = (text.strip() for text in texts)
    if not instruction or not output:
        raise RefusedInput("instruction and output must not be empty")
    return Row(prompt=f"{instruction}\n\n{context}" if context else instruction, response=output)


def heldout_indices(count: int, share: float) -> set[int]:
    """Which of `count` rows are held out: at least one, the same ones for every seed and batch size,
    so that held-out losses of different trials can be compared."""
    return set(random.Random(_SPLIT_SEED).sample(range(count), max(1, round(count * share))))


def refuse_too_few(count: int, holdout: float, needed: int, which: str = "rows") -> None:
    """Raise RefusedInput unless, after holding out, `needed` rows (one optimizer step's) remain to train on."""
    remaining = count - max(1, round(count * holdout))
    if remaining < needed:
        raise RefusedInput(
            f"the data has {count} {which}, {remaining} after holding out {holdout:.0%}, but one step needs {needed} "
            "(batch_size x grad_accum_steps). Use more rows or a smaller batch_size."
        )
