"""The real command line in a process of its own, as a user has it."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

SECONDS = 300


@dataclass(frozen=True)
class Said:
    """What a command said and how it left."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


Lab = Callable[..., Said]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """`lab("model=tiny", ...)` runs `python -m lora_lab model=tiny ...` in an empty folder, without any GPU or hub."""

    def run(*arguments: str, cwd: Path = tmp_path, **environment: str) -> Said:
        done = subprocess.run(
            [sys.executable, "-m", "lora_lab", *arguments],
            cwd=cwd,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **environment},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        return Said(done.returncode, done.stdout, done.stderr)

    return run
