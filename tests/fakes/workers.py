"""What stands for process.main and process.check in a worker, which imports it by name."""

import os
import signal
from dataclasses import replace
from multiprocessing.connection import Connection

from lora_lab.events import Ended, Event, PhaseBegan, Ready, Warned, encode
from lora_lab.look import Look
from lora_lab.seat import Seat
from lora_lab.trial.variables import is_launchers


def _say(connection: Connection, *events: Event) -> None:
    for event in events:
        connection.send_bytes(encode(event).encode())


def ended(reason: str = "") -> Ended:
    return Ended(t=0.0, outcome="finished", reason=reason, traceback=None, step=None, asked_bytes=None)


def of_two(connection: Connection, _: object, __: object, ___: object, seat: Seat, *____: object) -> None:
    """Each says its rank, and something that the lead alone may say."""
    warned = Warned(t=0.0, text=f"{seat.rank} of {seat.world_size}")
    began = PhaseBegan(t=0.0, phase=f"of {seat.rank}")
    _say(connection, Ready(t=0.0, pid=os.getpid(), prepared=True), warned, began, ended())


def second_dies(connection: Connection, _: object, __: object, ___: object, seat: Seat, *____: object) -> None:
    """The lead works on; the other is killed once the lead is there."""
    _say(connection, Ready(t=0.0, pid=os.getpid(), prepared=True), PhaseBegan(t=0.0, phase="start"))
    if seat.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def second_fails(connection: Connection, _: object, __: object, ___: object, seat: Seat, *____: object) -> None:
    """The lead works on; the other says why it cannot."""
    _say(connection, Ready(t=0.0, pid=os.getpid(), prepared=True))
    if seat.rank == 1:
        _say(connection, replace(ended("its memory is full"), outcome="out_of_memory"))
        return
    signal.pause()


def never_pauses(connection: Connection, *_: object) -> None:
    while True:
        _say(connection, PhaseBegan(t=0.0, phase="start"))


def silent(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def speaks(connection: Connection, *_: object) -> None:
    _say(connection, Ready(t=0.0, pid=os.getpid(), prepared=True), PhaseBegan(t=0.0, phase="start"), ended())


def says_launchers(connection: Connection, *_: object) -> None:
    _say(connection, ended(" ".join(name for name in os.environ if is_launchers(name))))


def looks_once(connection: Connection, *_: object) -> None:
    connection.send(Look(faults=("the first is refused",)))
    os.kill(os.getpid(), signal.SIGSTOP)
