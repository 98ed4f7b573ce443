"""Hydra's complaints about a command line, held back and put in plain words."""

import io
import sys
from contextlib import redirect_stderr

from lora_lab.compose import explain
from lora_lab.outcome import EXIT_REFUSED
from lora_lab.secrets import without_secrets


class Composing:
    """While Hydra composes, its complaints are held back, so that they can be put better.

    Hydra leaves with exit code 1 whatever was wrong with the command line; a refusal is 2 here."""

    def __init__(self) -> None:
        self._said = io.StringIO()
        self._redirect = redirect_stderr(self._said)
        self._composing = False

    def __enter__(self) -> None:
        self._composing = True
        self._redirect.__enter__()

    def over(self) -> None:
        """Composition went well: from here on stderr is stderr. Does nothing the second time."""
        if self._composing:
            self._composing = False
            self._redirect.__exit__(None, None, None)
            sys.stderr.write(self._said.getvalue())

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        refused = self._composing and isinstance(error, SystemExit) and error.code == 1
        said = self._said.getvalue()
        if refused:
            self._said = io.StringIO()
        self.over()
        if refused:
            print(f"Refused, nothing was started:\n{without_secrets(explain(said))}", file=sys.stderr)
            raise SystemExit(EXIT_REFUSED) from None


COMPOSING = Composing()
"""Of this process."""
