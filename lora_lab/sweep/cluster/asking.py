"""Check a sweep for a cluster, and ask a node what it is and what it sees, before the sweep is planned."""

import sys
import tempfile
import uuid
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path

from omegaconf import DictConfig

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.options import ClusterKind
from lora_lab.sweep.cluster.choice import engine_of
from lora_lab.sweep.cluster.engine import Engine, NotSubmitted
from lora_lab.sweep.cluster.node import Node, look, software
from lora_lab.sweep.plan import GridPoint
from lora_lab.trial.interrupt import ctrl_c

POLL_SECONDS = 0.5


def check_on_cluster(points: Sequence[GridPoint], config: DictConfig) -> None:
    """Raise InvalidInput for a sweep whose trials cannot run on a cluster.

    Args:
        config: what Hydra composed without the points' overrides."""
    kinds = {point.config.cluster.kind for point in points}
    if kinds == {ClusterKind.local}:
        return
    name = f"cluster={next(kind.name for kind in kinds if kind is not ClusterKind.local)}"
    if len({f"{point.config.cluster} {point.config.device == 'cpu'}" for point in points}) > 1:
        raise InvalidInput(f"{name} holds for a whole sweep; give cluster and device one value each for all points.")
    searched = next((point.searched for point in points if point.searched), "")
    if searched:
        raise InvalidInput(f"{searched}=max tries one value after the other on one card. Leave {name} out.")
    launcher = config.hydra.runtime.choices.get("hydra/launcher")
    if launcher not in (None, "basic"):
        raise InvalidInput(f"hydra/launcher={launcher} and {name} both spread trials; leave one of them out.")
    if config.hydra.job.env_set:
        raise InvalidInput(f"hydra.job.env_set does not reach the nodes of {name}. Set variables before the command.")


def ask_a_node(config: TrialConfig, folder: Path) -> Node:
    """Return a node like those that the trials will run on.

    Args:
        folder: next to which the nodes have to see files of this machine.

    Raises: InvalidInput when no node can run the trials; KeyboardInterrupt."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".node-", ignore_cleanup_errors=True) as place:
            return _ask(config, Path(place))
    except OSError as error:
        raise InvalidInput(f"nothing can be written to {folder.parent} ({error.strerror}). Make room there.") from error


def _ask(config: TrialConfig, place: Path) -> Node:
    word = uuid.uuid4().hex
    (place / "word").write_text(word, encoding="ascii")
    kind = config.cluster.kind.name
    engine = engine_of(config.cluster, config.device != "cpu", place)
    try:
        job = engine.start(look, place, word, config.device)
    except NotSubmitted as error:
        raise InvalidInput(f"cluster={kind}: {error}") from error
    print(f"asking a node of the cluster what it is ({job})", file=sys.stderr, flush=True)
    node = _answer(engine, job)
    if isinstance(node, str):
        raise InvalidInput(f"cluster={kind}: the node {node.rstrip('.')}.")
    if node is None or not (place / "seen").exists():
        raise InvalidInput(
            f"cluster={kind}: {job} has ended, and no answer of its node is in {place.parent}. The folder of a sweep "
            "has to lie on a file system that this machine and the nodes share, and so has this Python. "
            f"The job's last words: {engine.log(job) or 'none that are seen here'}"
        )
    mine = software()
    differ = [
        f"{name} {mine.get(name, 'absent')} here, {node.software.get(name, 'absent')} there"
        for name in mine.keys() | node.software.keys()
        if mine.get(name) != node.software.get(name)
    ]
    if differ:
        raise InvalidInput(
            f"cluster={kind}: the node {node.host} runs other software: {'; '.join(sorted(differ))}. Use one "
            "environment for both."
        )
    return node


def _answer(engine: Engine, job: str) -> Node | str | None:
    with ctrl_c() as pressed:
        while not engine.is_over(job):
            if wait([pressed], POLL_SECONDS):
                engine.cancel(job)
                raise KeyboardInterrupt
    answer: Node | str | None = engine.told(job)
    return answer
