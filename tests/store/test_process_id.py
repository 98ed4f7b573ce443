"""Whose process is gone: only then may somebody else end its record."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
from conftest import until

from lora_lab.store.process_id import Owner, this_process

CHILD = """
import json, sys
from dataclasses import asdict
from lora_lab.store.process_id import this_process
{before}
print(json.dumps(asdict(this_process())), flush=True)
sys.stdin.read()
"""


@contextmanager
def child(before: str = "") -> Iterator[tuple[subprocess.Popen[str], Owner]]:
    """A process that says who it is, and lives until its input is closed."""
    command = [sys.executable, "-c", CHILD.format(before=before)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Owner(**json.loads(process.stdout.readline()))


def test_this_process_is_there() -> None:
    me = this_process()
    assert not me.gone
    assert (me.pid, me) == (os.getpid(), this_process())
    assert me.started > 0


def test_another_process_is_there_until_it_has_left() -> None:
    with child() as (process, owner):
        assert owner.pid == process.pid
        assert not owner.gone
        process.communicate()
        assert owner.gone


def test_a_killed_process_is_gone_even_while_nobody_has_asked_how_it_ended() -> None:
    with child() as (process, owner):
        process.kill()
        until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE, "a zombie", seconds=10)
        assert Path(f"/proc/{process.pid}").exists()
        assert owner.gone


def test_a_stopped_process_is_there() -> None:
    with child() as (process, owner):
        psutil.Process(process.pid).suspend()
        until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED, "a stopped process", seconds=10)
        assert not owner.gone
        psutil.Process(process.pid).resume()


@pytest.mark.parametrize("name", ["a) Z 1 2", ") Z", "sp ace", "(((", "é"])
def test_a_process_may_have_any_name(name: str) -> None:
    with child(f"open('/proc/self/comm', 'w').write({name!r})") as (process, owner):
        assert name in psutil.Process(process.pid).name()
        assert not owner.gone
        process.communicate()
        assert owner.gone


def test_a_pid_that_was_given_out_again_is_another_process() -> None:
    me = this_process()
    assert replace(me, started=me.started + 1).gone
    assert replace(me, started=me.started - 1).gone


def test_a_process_of_an_earlier_boot_is_gone_though_its_pid_and_start_are_taken() -> None:
    assert replace(this_process(), boot_id="00000000-0000-0000-0000-000000000000").gone


def test_of_another_machine_nothing_is_known() -> None:
    """The folder may lie on a disk that several machines share."""
    with child() as (process, owner):
        process.communicate()
        elsewhere = replace(owner, host="elsewhere")
        assert not elsewhere.gone
        assert not replace(elsewhere, boot_id="0").gone


def test_a_forked_process_is_another_one() -> None:
    code = (
        "import os; from lora_lab.store.process_id import this_process; me = this_process(); pid = os.fork()\n"
        "if not pid: os._exit(this_process() == me or this_process().pid != os.getpid())\n"
        "assert os.waitpid(pid, 0)[1] == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_owner_comes_back_from_disk() -> None:
    assert Owner(**json.loads(json.dumps(asdict(this_process())))) == this_process()
