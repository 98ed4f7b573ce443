"""`python -m lora_lab`: compose a trial, run it, record it, exit with a code that says how it ended.

The worker's process imports this module by name, so everything heavy is imported inside main().
"""

import io
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """The command line. Always leaves through SystemExit; README.md lists the codes."""
    if not sys.platform.startswith("linux"):
        raise SystemExit(f"lora_lab runs on Linux (on Windows inside WSL2); this is {sys.platform}.")
    import hydra

    from lora_lab.compose import CONF, register_schema
    from lora_lab.outcome import EXIT_INTERRUPTED, combined_exit_code

    register_schema()
    codes: list[int] = []
    composing = _Composing()

    def job(composed: "DictConfig") -> int:
        composing.over()
        codes.append(_trial(composed))
        return codes[-1]

    try:
        with composing:
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None
    raise SystemExit(combined_exit_code(codes) if codes else 0)


def _trial(composed: "DictConfig") -> int:
    """Run one composed trial and return its exit code."""
    from hydra.core.hydra_config import HydraConfig

    from lora_lab.compose import GROUPS, load
    from lora_lab.config import RefusedInput
    from lora_lab.outcome import EXIT_REFUSED
    from lora_lab.session import Request, run_session

    hydra_config = HydraConfig.get()
    try:
        request = Request(
            config=load(composed),
            choices={group: str(hydra_config.runtime.choices[group]) for group in GROUPS},
            overrides=list(hydra_config.overrides.task),
            folder=Path(hydra_config.runtime.output_dir),
        )
        return run_session(request).exit_code
    except RefusedInput as refusal:
        print(f"Refused, no model was loaded:\n{refusal}", file=sys.stderr)
        return EXIT_REFUSED


class _Composing:
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
        """Composition went well: from here on stderr is stderr."""
        if self._composing:
            self._composing = False
            self._redirect.__exit__(None, None, None)
            sys.stderr.write(self._said.getvalue())

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        from lora_lab.compose import explain
        from lora_lab.outcome import EXIT_REFUSED

        refused = self._composing and isinstance(error, SystemExit) and error.code == 1
        said = self._said.getvalue()
        if refused:
            self._said = io.StringIO()
        self.over()
        if refused:
            print(f"Refused, nothing was started:\n{explain(said)}", file=sys.stderr)
            raise SystemExit(EXIT_REFUSED) from None


if __name__ == "__main__":
    main()
