"""Output that cannot be written costs the output and nothing else: neither the work nor its exit code."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SPEAKS = """
import os, subprocess, sys
from rich.console import Console
from lora_lab.output import never_end_for_output
never_end_for_output()
for _ in range(200):
    print("x" * 1000, "\\udc80", "\\u00b1")
    print("y" * 1000, file=sys.stderr)
    Console(stderr=True).print("[red]z[/red]")
Console(file=sys.stdout).print("z")
opened = os.open(os.devnull, os.O_RDONLY)
assert opened > 2, "what is opened later is not written to by what prints"
subprocess.run(["echo", "a child"], check=True)
print("the last words", end="")
raise SystemExit(7)
"""


@contextmanager
def full() -> Iterator[int]:
    opened = os.open("/dev/full", os.O_WRONLY)
    yield opened
    os.close(opened)


@contextmanager
def unread_pipe() -> Iterator[int]:
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@contextmanager
def full_pipe_that_does_not_block() -> Iterator[int]:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    yield writer
    os.close(reader)
    os.close(writer)


@contextmanager
def read_only() -> Iterator[int]:
    opened = os.open("/dev/null", os.O_RDONLY)
    yield opened
    os.close(opened)


@contextmanager
def closed() -> Iterator[None]:
    yield None


BROKEN = [full, unread_pipe, full_pipe_that_does_not_block, read_only, closed]


def spoken(folder: Path, place: int | None, which: tuple[int, ...], words: list[str], **environment: str) -> int:
    """Run Python with one or more of its standard descriptors broken; its exit code."""
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        ends = {1: out.fileno(), 2: err.fileno()}
        closing = [end for end in which if place is None]
        redirect = " ".join(f"{end}>&-" for end in closing)
        for end in which:
            ends[end] = ends[end] if place is None else place
        return subprocess.run(
            ["sh", "-c", f'exec "$0" "$@" {redirect}', sys.executable, *words],
            stdout=ends[1],
            stderr=ends[2],
            env={**os.environ, **environment},
            timeout=60,
            check=False,
        ).returncode


@pytest.mark.parametrize("which", [(1,), (2,), (1, 2)], ids=["stdout", "stderr", "both"])
@pytest.mark.parametrize("broken", BROKEN)
def test_the_work_goes_on_and_its_exit_code_is_its_own(
    broken: Callable[[], Iterator[int | None]], which: tuple[int, ...], tmp_path: Path
) -> None:
    nonblocking = broken is full_pipe_that_does_not_block
    words = SPEAKS.replace('subprocess.run(["echo", "a child"], check=True)', "") if nonblocking else SPEAKS
    with broken() as place:  # type: ignore[attr-defined]  # a context manager
        assert spoken(tmp_path, place, which, ["-c", words]) == 7
    out, err = (tmp_path / "out").read_text(), (tmp_path / "err").read_text()
    if 1 not in which:
        assert out.endswith("the last words")
        assert len(out) > 200_000
    if 2 not in which:
        assert len(err) > 200_000
    assert "Exception" not in err
    assert "Error" not in err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_an_encoding_lacks_is_written_as_a_number(encoding: str, tmp_path: Path) -> None:
    assert spoken(tmp_path, None, (), ["-c", SPEAKS], PYTHONIOENCODING=encoding) == 7
    assert b"\\udc80" in (tmp_path / "out").read_bytes()


@pytest.mark.parametrize("broken", [full, unread_pipe, closed])
def test_a_command_keeps_its_exit_code(broken: Callable[[], Iterator[int | None]], tmp_path: Path) -> None:
    with broken() as place:  # type: ignore[attr-defined]  # a context manager
        assert spoken(tmp_path, place, (1, 2), ["-m", "lora_lab", "batch_size=0"]) == 2
