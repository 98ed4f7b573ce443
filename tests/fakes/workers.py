"""What stands for process.main and process.check in a worker, which imports it by name."""

import os
import signal
from multiprocessing.connection import Connection

from lora_lab.events import Ended, Event, PhaseBegan, Ready, encode
from lora_lab.look import Look
from lora_lab.trial.variables import is_launchers


def _say(connection: Connection, *events: Event) -> None:
    for event in events:
        connection.send_bytes(encode(event).encode())


def ended(reason: str = "") -> Ended:
    return Ended(t=0.0, outcome="finished", reason=reason, traceback=None, step=None, asked_bytes=None)


def silent(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def speaks(connection: Connection, *_: object) -> None:
    _say(connection, Ready(t=0.0, pid=os.getpid(), prepared=True), PhaseBegan(t=0.0, phase="start"), ended())


def says_launchers(connection: Connection, *_: object) -> None:
    _say(connection, ended(" ".join(name for name in os.environ if is_launchers(name))))


def looks_once(connection: Connection, *_: object) -> None:
    connection.send(Look(faults=("the first is refused",)))
    os.kill(os.getpid(), signal.SIGSTOP)
