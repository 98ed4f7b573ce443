"""The commands of `lora-lab`. With `run`, or without a command, Hydra reads the command line: a trial or a sweep."""

import difflib
import importlib
import signal
from collections.abc import Sequence

RUN = "run"

COMMANDS = {
    "report": "lora_lab.report.__main__",
    "best": "lora_lab.best",
    "data": "lora_lab.data",
    "fit": "lora_lab.fit.__main__",
    "forecast": "lora_lab.forecast.__main__",
    "generate": "lora_lab.generate",
    "export": "lora_lab.export",
    "recompute": "lora_lab.recompute",
    "records": "lora_lab.records",
    "ui": "lora_lab.ui",
    "completion": "lora_lab.completion",
}
"""The module of each command, with a function main(arguments) -> exit code."""


def call(command: str, arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `lora-lab report | head` ends without an error
    code: int = importlib.import_module(COMMANDS[command]).main(arguments)
    return code


def meant(word: str) -> str:
    """Return the command that a word was probably meant to be; empty where it is not near any."""
    near = difflib.get_close_matches(word, [RUN, *COMMANDS], n=1, cutoff=0.7)
    return near[0] if near and word.isalpha() else ""
