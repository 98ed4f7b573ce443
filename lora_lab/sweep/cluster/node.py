"""What runs on a node of a cluster: a look at the node before a sweep, and each trial."""

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_lab.config import InvalidInput
from lora_lab.files import write_json
from lora_lab.placement import Placement
from lora_lab.reading import Damaged, whole
from lora_lab.store.environment import device_facts, environment
from lora_lab.store.heartbeat import Heartbeat
from lora_lab.store.process_id import Owner, this_process
from lora_lab.store.trial_folder import RECORD
from lora_lab.trial.devices import choose_placement
from lora_lab.trial.session import Request, run_session


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node as it sees itself."""

    host: str
    placement: Placement
    """Where its trials run."""
    device: dict[str, str]
    """Facts about that, which trials of one sweep have in common."""
    software: dict[str, str]
    """Versions of packages, and the digest of this code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a node says about a trial that it does not run any more."""

    lost: str = ""
    """Why the trial did not come to an end of its own; empty when it did."""
    refused: str = ""
    """Why it was not begun; empty when it was."""
    has_record: bool = True
    """False where no record was written that the asking process could wait for."""


def look(folder: Path, word: str, device: str) -> Node | str:
    """Look at the node that this runs on.

    Args:
        folder: where the asking process has written `word` into a file of that name.
        device: what the user asked for.

    Returns: the node, or what is wrong with it."""
    try:
        if (folder / "word").read_text(encoding="ascii") != word:
            raise FileNotFoundError
        (folder / "seen").touch()
    except OSError:
        return f"does not see {folder} as this machine does"
    try:
        placement = choose_placement(device)
    except InvalidInput as refusal:
        return f"cannot run the trials: {refusal}"
    if device != "cpu" and not placement.cards:
        return "shows no NVIDIA card to the job, which has asked for one. To train on its CPU, add device=cpu"
    return Node(host=placement.host, placement=placement, device=_common(placement), software=software())


def software() -> dict[str, str]:
    """Return the versions of packages and the digest of the code that this process would run a trial with."""
    facts = environment()
    return {name: fact for name, fact in facts.items() if name == "code" or name.startswith("version.")}


def _common(placement: Placement) -> dict[str, str]:
    return {name: fact for name, fact in device_facts(placement).items() if name != "device.uuid"}


def run_trial(request: Request, ticket: Path, device: Mapping[str, str]) -> Told:
    """Run a trial on this node.

    Args:
        ticket: the file whose maker has the right to run it.
        device: the facts about the device that the sweep's trials have in common.
    """
    if not ticket.parent.is_dir():
        return Told(refused=f"{_host()} does not see {ticket.parent}, which lies on no file system that it shares.")
    begun_before = Told(lost="another start of its job had begun it")
    if ticket.exists():  # that start may be alive: its signs of life are its own
        return begun_before
    with Heartbeat(request.folder):
        if not take(ticket):
            return begun_before
        try:
            here = _common(choose_placement(request.config.device))
            if here != device:
                raise InvalidInput(
                    f"{_host()} has another device ({_words(here)}) than the sweep's trials ({_words(device)}), and "
                    "their figures could not be compared. Give a partition whose nodes are alike."
                )
            with _signals():
                run_session(request)
        except KeyboardInterrupt:
            return Told(lost="the cluster ended it", has_record=(request.folder / RECORD).exists())
        except (InvalidInput, Damaged) as refusal:
            return Told(refused=str(refusal))
        return Told()


def _host() -> str:
    return f"The node {this_process().host}"


def _words(device: Mapping[str, str]) -> str:
    return ", ".join(device.values())


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Take the signals by which Slurm ends a job (SIGTERM, and submitit's SIGUSR2) for a Ctrl-C: what was measured
    until then is recorded."""
    before = {
        each: signal.signal(each, lambda *_: signal.raise_signal(signal.SIGINT))
        for each in (signal.SIGTERM, signal.SIGUSR2)
    }
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def take(ticket: Path) -> bool:
    """Take the right to run a trial, which one process gets, also on a network file system. Return whether it is this
    one."""
    own = ticket.with_name(f"{ticket.name}.{this_process().host}.{os.getpid()}")
    write_json(own, asdict(this_process()))
    try:
        os.link(own, ticket)
    except FileExistsError:
        return False
    finally:
        own.unlink()
    return True


def taken_by(ticket: Path) -> Owner | None:
    """Return the process that has taken a ticket; None when nobody has.

    Raises: Damaged."""
    return whole(Owner, ticket)
