"""Answer questions with a trained model, next to its base model: python -m lora_lab.generate RUN "question"

Both answers are always of the likeliest tokens. Without a question it reads them line by line:
each model goes on with its own conversation, /reset begins a new one, and Ctrl-D ends. Exit code 0 with answers, 2 when
the input is invalid."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_lab.composition.compose import stored_config
from lora_lab.config import InvalidInput
from lora_lab.dataset.row import Role, Turn, as_conversations
from lora_lab.outcome import EXIT_INTERRUPTED, EXIT_REFUSED
from lora_lab.output import never_end_for_output
from lora_lab.store.errors import TrackingFailed
from lora_lab.store.trained import CONFIG, RUN_HELP, find_trained
from lora_lab.trial.in_process import prepare_process

if TYPE_CHECKING:
    from lora_lab.worker.answers import Answerer, TimedAnswer

_MODELS = ("base", "tuned")
_RESET = "/reset"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    never_end_for_output()
    asked = _parser().parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as place:
            _run(asked, Path(place))
    except (InvalidInput, TrackingFailed) as refusal:
        print(refusal, file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def _run(asked: argparse.Namespace, place: Path) -> None:
    if any(not question.strip() for question in asked.question):
        raise InvalidInput("a question is empty. Give some text in quotes, or no question to be asked for them.")
    trained = find_trained(asked.run, place)
    config = stored_config(trained.folder / CONFIG)
    prepare_process(config)
    from lora_lab.worker.answers import Answerer  # it imports torch

    session = Session(Answerer(config, trained.weights, as_conversations(config.data.layout, trained.kinds)), asked)
    for question in asked.question:
        session.reset()
        session.ask(question)
    if not asked.question:
        _converse(session)


class Session:
    """The conversations of the models that answer."""

    def __init__(self, answerer: "Answerer", asked: argparse.Namespace) -> None:
        self._answerer = answerer
        self._most_tokens: int = asked.max_new_tokens
        self._models = (asked.only,) if asked.only else _MODELS
        self._system = [Turn(Role.system, asked.system)] if asked.system else []
        if self._system and not answerer.has_template:
            raise InvalidInput(
                "--system needs a chat template, and the model has none or was trained on plain text: leave it out."
            )
        self._console = Console()
        self._said: dict[str, list[Turn]] = {}
        self.reset()

    def reset(self) -> None:
        """Begin new conversations."""
        self._said = {model: [*self._system] for model in self._models}

    def ask(self, question: str) -> None:
        """Let each model answer, and print the answers side by side.

        Raises: InvalidInput when a conversation is longer than the model's positions."""
        turn = Turn(Role.user, question)
        for model in self._models:
            room = self._answerer.room([*self._said[model], turn])
            if room is not None and room < 1:
                raise InvalidInput(f"the conversation is {1 - room} tokens longer than the model reads. Shorten it.")
        answers = {model: self._answer(model, turn) for model in self._models}
        self._show(question, answers)

    def _answer(self, model: str, turn: Turn) -> "TimedAnswer":
        turns = [*self._said[model], turn]
        room = self._answerer.room(turns)
        most = self._most_tokens if room is None else min(self._most_tokens, room)
        answer = self._answerer.answer(turns, tuned=model == "tuned", most_tokens=most)
        self._said[model] = [*turns, Turn(Role.assistant, answer.text)]
        return answer

    def _show(self, question: str, answers: "dict[str, TimedAnswer]") -> None:
        table = Table(title=Text(question), title_justify="left", show_lines=True)
        for model in answers:
            table.add_column(model, ratio=1, overflow="fold")
        table.add_row(*(Text(answer.text or "(nothing)") for answer in answers.values()))
        table.add_row(*(_figures(answer) for answer in answers.values()))
        self._console.print(table)
        gib, what = self._answerer.memory()
        self._console.print(f"memory: {gib:.2f} GiB {what}", highlight=False)


def _figures(answer: "TimedAnswer") -> str:
    rate = answer.tokens_per_second
    ended = "" if answer.ended else ", cut off"
    speed = "" if rate is None else f", {rate:.1f} tokens/s after it"
    return f"{answer.tokens} tokens{ended}; first token after {answer.first_token_seconds:.2f} s{speed}"


def _converse(session: Session) -> None:
    """Read questions until the end of the input."""
    if sys.stdin.isatty():
        print(f"Type a question. {_RESET} begins a new conversation, Ctrl-D ends.")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line == _RESET:
            session.reset()
        elif line:
            try:
                session.ask(line)
            except InvalidInput as refusal:
                print(f"{refusal} {_RESET} begins a new one.", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lora_lab.generate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "question", nargs="*", default=[], help="a question; each begins a new conversation (default: read lines)"
    )
    parser.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=_count,
        default=256,
        help="the most tokens of an answer (default: %(default)s)",
    )
    parser.add_argument("--system", metavar="TEXT", help="a system prompt")
    parser.add_argument("--only", choices=_MODELS, help="let one model answer (default: both)")
    return parser


def _count(text: str) -> int:
    """Read a number of tokens. Raise ArgumentTypeError, because argparse replaces the text of a ValueError."""
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of tokens. Give a whole number such as 256")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
