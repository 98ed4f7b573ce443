"""Recognise by its columns how a record holds a row, and turn it into one."""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

from lora_lab.config import InvalidInput
from lora_lab.data_config import DataConfig
from lora_lab.dataset.fields import Fields, text_of, written
from lora_lab.dataset.row import Conversation, Passage, Role, Row
from lora_lab.dataset.turns import turns_of
from lora_lab.options import Layout


class NothingToTrain(InvalidInput):
    """A record has no answer. Some public data sets have such rows."""


@dataclass(frozen=True, slots=True)
class Format:
    """One way to hold a row: the layout, and the column of each of its parts."""

    name: str
    layout: Layout
    columns: dict[str, str]

    @property
    def needed(self) -> tuple[str, ...]:
        """Return the columns that no record may lack."""
        return tuple(column for part, column in self.columns.items() if part not in _OPTIONAL)

    def fits(self, fields: Collection[object]) -> bool:
        """Return whether all needed columns are there."""
        return all(column in fields for column in self.needed)

    def row_of(self, record: object) -> Row:
        """Turn one record into a row.

        Raises: InvalidInput when it is not an object, lacks a column, or a column holds something else."""
        if not isinstance(record, dict):
            raise InvalidInput(f"expected a JSON object, found {type(record).__name__}")
        missing = [column for column in self.needed if column not in record]
        if missing:
            raise InvalidInput(f"no column {' and no column '.join(missing)}; found {_listed(record)}")
        return _READ[self.layout](record, self.columns)


_OPTIONAL = ("input",)

FORMATS = (
    Format("OpenAI chat", Layout.chat, {"messages": "messages"}),
    Format("ShareGPT", Layout.chat, {"messages": "conversations"}),
    Format("Alpaca", Layout.instruct, {"instruction": "instruction", "input": "input", "output": "output"}),
    Format("Dolly", Layout.instruct, {"instruction": "instruction", "input": "context", "output": "response"}),
    Format(
        "questions and answers", Layout.instruct, {"instruction": "question", "input": "context", "output": "answer"}
    ),
    Format("prompts and responses", Layout.instruct, {"instruction": "prompt", "output": "response"}),
    Format("prompts and completions", Layout.completion, {"prompt": "prompt", "completion": "completion"}),
    Format("prompts and completions", Layout.instruct, {"instruction": "prompt", "output": "completion"}),
    Format("plain text", Layout.text, {"text": "text"}),
)
"""The first that fits is taken: a record of Alpaca's may have a column `text` too."""

_UNSUPPORTED = (
    (("chosen", "rejected"), "preference data"),
    (("prompt", "completion", "label"), "preference data without pairs"),
    (("input_ids",), "data that is tokenised already"),
    (("anchor", "positive"), "data for embeddings"),
    (("sentence1", "sentence2"), "data for embeddings"),
    (("premise", "hypothesis"), "data for classification"),
    (("text", "label"), "data for classification"),
)
"""Columns of data for other kinds of training."""

SUPPORTED = (
    "Supported are: chat (messages, or conversations), instruct (instruction and output, perhaps input; question and "
    "answer; prompt and response), completion (prompt and completion), text (text)."
)

PARTS = {each.layout: tuple(each.columns) for each in reversed(FORMATS)}
"""What the columns of each layout hold: the names that data.map has."""


def format_of(record: object, data: DataConfig) -> Format | None:
    """Return the way this record holds a row; None where it is none of those that the config allows.

    Raises: InvalidInput for data of another kind of training."""
    if not isinstance(record, dict):
        return None
    if data.map.named:
        return _mapped(data)
    for columns, what in _UNSUPPORTED if data.layout is Layout.auto else ():
        if set(columns) <= record.keys():
            raise InvalidInput(_foreign(columns, what, record))
    return next((each for each in FORMATS if data.layout in (Layout.auto, each.layout) and each.fits(record)), None)


def _mapped(data: DataConfig) -> Format:
    """Return the format that data.map makes, of the given layout or of the first that has all of its parts."""
    named = data.map.named
    layouts = PARTS if data.layout is Layout.auto else (data.layout,)
    layout = next(layout for layout in layouts if named.keys() <= {*PARTS[layout]})
    usual = next(each for each in FORMATS if each.layout is layout)
    # data.map.instruction=input leaves the usual name of the context behind; nothing is to stand there twice
    left = {part: column for part, column in usual.columns.items() if part in named or column not in named.values()}
    return Format("data.map", layout, left | named)


def map_fault(data: DataConfig) -> str:
    """Say what is wrong with data.map; empty when nothing is."""
    named = data.map.named
    layouts = [layout for layout in PARTS if data.layout in (Layout.auto, layout)]
    if named and not any(named.keys() <= {*PARTS[layout]} for layout in layouts):
        known = "; ".join(f"{layout.name}: {', '.join(PARTS[layout])}" for layout in layouts)
        return f"data.map names {', '.join(named)}, and no layout has all of these. The names are, for {known}."
    twice = next((column for column, count in Counter(named.values()).items() if count > 1), None)
    return f"data.map gives the column {twice} twice; name two columns." if twice is not None else ""


def unknown(record: object, data: DataConfig) -> str:
    """Say that a record is none of the known kinds, and what to type."""
    if not isinstance(record, dict):
        return f"expected a JSON object, found {type(record).__name__}"
    other = next((each for each in FORMATS if each.fits(record)), None)
    if other is not None:
        return (
            f"data.layout={data.layout.name}, and these are {other.name} ({', '.join(other.needed)}). "
            f"Use data.layout={other.layout.name}, or name the columns with data.map."
        )
    given = data.layout is not Layout.auto
    parts = [part for part in PARTS[data.layout if given else Layout.instruct] if part not in _OPTIONAL]
    texts = [name for name, value in record.items() if given or value is None or isinstance(value, str)]
    columns = [*(str(name) for name in texts if str(name).isidentifier()), *["..."] * len(parts)]
    example = ", ".join(f"{part}: {column}" for part, column in zip(parts, columns, strict=False))
    what = (
        f"data.layout={data.layout.name} needs {' and '.join(parts)}; these are the" if given else "no layout has the"
    )
    return f'{what} columns found: {_listed(record)}. {SUPPORTED}\n  Name yours, for example: "data.map={{{example}}}"'


def _foreign(columns: tuple[str, ...], what: str, record: dict[object, object]) -> str:
    remedy = ""
    if "chosen" in columns:
        pair = "instruction: prompt, output: chosen" if "prompt" in record else "text: chosen"
        parts = "messages: chosen" if isinstance(record["chosen"], list) else pair
        remedy = f' To train on the chosen answers alone: "data.map={{{parts}}}".'
    if columns == ("text", "label"):
        remedy = " To train on the texts without their labels: data=text."
    return f"this is {what} ({', '.join(columns)}), which is not supported. {SUPPORTED}{remedy}"


def _chat(fields: Fields, columns: dict[str, str]) -> Row:
    return _answered(Conversation(turns_of(fields[columns["messages"]], columns["messages"])), columns["messages"])


def _answered(found: Conversation, column: str) -> Conversation:
    """Leave out what follows the last answer.

    Raises: InvalidInput when there is none."""
    if not found.answers:
        raise NothingToTrain(
            f"{column} has no turn of the assistant, so there is nothing to train on. Leave the row out."
        )
    return Conversation(found.turns[: found.answers[-1] + 1], found.given)


def _instruct(fields: Fields, columns: dict[str, str]) -> Row:
    """Read a question, its context after a blank line, and the answer."""
    asked, answered = columns["instruction"], columns["output"]
    question, answer = text_of(fields, asked).strip(), text_of(fields, answered).strip()
    column = columns.get("input", "")
    context = text_of(fields, column).strip() if fields.get(column) is not None else ""
    if not question:
        raise InvalidInput(f"{asked} must not be empty")
    if not answer:
        raise NothingToTrain(f"{answered} must not be empty")
    return Conversation.of(f"{question}\n\n{context}" if context else question, answer)


def _completion(fields: Fields, columns: dict[str, str]) -> Row:
    """Read two texts, or two lists of messages of which the second is trained."""
    before, after = columns["prompt"], columns["completion"]
    prompt, completion = fields[before], fields[after]
    if isinstance(prompt, list) and isinstance(completion, list):
        turns = turns_of([*prompt, *completion], f"{before} and {after}")
        given = len(turns_of(prompt, before))
        if len(turns) == given or turns[given].role is not Role.assistant:
            raise InvalidInput(f"{after} must begin with a turn of the assistant")
        return _answered(Conversation(turns, given), after)
    if isinstance(prompt, list) != isinstance(completion, list):
        raise InvalidInput(
            f"{before} is {written(prompt)} and {after} is {written(completion)}; give two texts or two lists"
        )
    if not text_of(fields, after).strip():
        raise NothingToTrain(f"{after} must not be empty")
    return Passage(text_of(fields, before), text_of(fields, after))


def _text(fields: Fields, columns: dict[str, str]) -> Row:
    text = text_of(fields, columns["text"])
    if not text.strip():
        raise NothingToTrain(f"{columns['text']} must not be empty")
    return Passage("", text)


_READ: dict[Layout, Callable[[Fields, dict[str, str]], Row]] = {
    Layout.chat: _chat,
    Layout.instruct: _instruct,
    Layout.completion: _completion,
    Layout.text: _text,
}


def _listed(record: Collection[object]) -> str:
    return ", ".join(str(name) if str(name).isprintable() else ascii(name) for name in record) or "none"
