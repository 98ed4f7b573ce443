"""The commands of `lora-lab`. With `run`, or without a command, Hydra reads the command line: a trial or a sweep."""

import importlib
import signal
from collections.abc import Sequence

RUN = "run"

COMMANDS = {
    "report": "lora_lab.report.__main__",
    "best": "lora_lab.best",
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
