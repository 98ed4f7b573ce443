"""A command that is forked by the tests' server does what it does in an interpreter of its own."""

import signal
from pathlib import Path

import pytest
from conftest import SERVER, Said, lab_in

ASKS = """
import multiprocessing, os, signal, sys, threading

def work(queue):
    queue.put((os.environ["CUDA_VISIBLE_DEVICES"], os.getcwd(), signal.getsignal(signal.SIGINT), sys.argv))

if __name__ == "__main__":
    from lora_lab.trial import forkserver

    print(sys.argv, os.getcwd(), sys.path[0], sys.stdin.read(), sys.stdout.isatty(), sys.stdout.encoding)
    print(signal.getsignal(signal.SIGINT), threading.active_count(), sorted(os.environ))
    print("said aside", file=sys.stderr)
    forkserver.prepare()
    queue = forkserver.context.Queue()
    worker = forkserver.context.Process(target=work, args=(queue,))
    worker.start()
    print(queue.get(timeout=60))
    worker.join()
    print(worker.exitcode)
"""

ENDS = {
    "by itself": "print('done')",
    "with a code": "raise SystemExit(3)",
    "with a word": "raise SystemExit('no')",
    "by an error": "1 / 0",
    "by a signal": f"import os; os.kill(os.getpid(), {signal.SIGTERM:d})",
    "with a last act": "import atexit; atexit.register(print, 'last')",
    "after its threads": "import threading, time; threading.Timer(0.2, print, ['waited for']).start()",
}


def both(folder: Path, module: str, *arguments: str) -> tuple[Said, Said]:
    return lab_in(folder, module)(*arguments), lab_in(folder, module, real=True)(*arguments)


@pytest.mark.nightly
def test_it_sees_what_an_interpreter_of_its_own_sees(tmp_path: Path) -> None:
    (tmp_path / "asks.py").write_text(ASKS)
    forked, real = both(tmp_path, "asks", "model=tiny", "a b")
    assert real.code == 0, real.err
    assert forked == real


@pytest.mark.parametrize("how", ENDS)
def test_it_ends_as_an_interpreter_ends(how: str, tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text(ENDS[how])
    forked, real = both(tmp_path, "ends")
    assert (forked.code, forked.out) == (real.code, real.out)
    assert forked.err.splitlines()[-1:] == real.err.splitlines()[-1:]  # a traceback has the server's own lines too


@pytest.mark.nightly
@pytest.mark.parametrize("command", ["lora_lab", "lora_lab.report", "lora_lab.best", "lora_lab.recompute"])
def test_each_command_says_the_same(command: str, tmp_path: Path) -> None:
    forked, real = both(tmp_path, command, "--help")
    assert forked == real
    assert real.code == 0


def test_a_variable_that_libraries_read_early_takes_an_interpreter() -> None:
    assert SERVER.serves({"COLUMNS": "40", "HF_HUB_OFFLINE": "1"})
    assert not SERVER.serves({"HF_HOME": "elsewhere"})
    assert not SERVER.serves({"HF_HUB_OFFLINE": "0"})
