"""Turn Hydra's errors about a command line into plain words."""

import io
import os
import re
import sys
from contextlib import redirect_stderr

from lora_lab.composition.explanations import COMPOSITION_ERRORS, explain
from lora_lab.config import InvalidInput
from lora_lab.outcome import EXIT_REFUSED
from lora_lab.secrets import without_secrets

_RAISE = "HYDRA_FULL_ERROR"
"""With it Hydra raises its errors instead of printing them."""


class Composing:
    """While Hydra composes, whatever it raises is about the command line or a yaml: invalid input, exit code 2.

    A user who sets HYDRA_FULL_ERROR=1 gets the traceback."""

    def __init__(self) -> None:
        self._composing = False

    def __enter__(self) -> None:
        self._composing = True
        self._traceback = os.environ.get(_RAISE) == "1"
        os.environ[_RAISE] = "1"
        self._said = io.StringIO()  # argparse prints
        self._redirect = redirect_stderr(self._said)
        self._redirect.__enter__()

    def over(self) -> None:
        """End composition: from here on errors are errors. Does nothing the second time."""
        if self._composing:
            self._end()
            sys.stderr.write(self._said.getvalue())

    def _end(self) -> None:
        self._composing = False
        self._redirect.__exit__(None, None, None)
        if not self._traceback:
            os.environ.pop(_RAISE)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if not self._composing:
            return
        if error is None or isinstance(error, BrokenPipeError):  # it was shown something, or its reader has gone
            self.over()
            return
        said = self._said.getvalue()
        option = re.search(r"error: (.*)", said)
        if isinstance(error, SystemExit) and error.code == EXIT_REFUSED and option:
            refusal = f"{option[1]}. --hydra-help lists the options."
        elif isinstance(error, SystemExit) and error.code == 1:
            refusal = said.strip()
        elif isinstance(error, InvalidInput) or (isinstance(error, COMPOSITION_ERRORS) and not self._traceback):
            refusal = explain(error)
        else:
            self.over()
            return
        self._end()
        print(f"Refused, nothing was started:\n{without_secrets(refusal)}", file=sys.stderr)
        raise SystemExit(EXIT_REFUSED) from None


COMPOSING = Composing()
"""This process's own."""
