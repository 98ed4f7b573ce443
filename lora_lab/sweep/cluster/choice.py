"""Choose the cluster that was asked for."""

from pathlib import Path

from lora_lab.options import ClusterKind
from lora_lab.places_config import ClusterConfig
from lora_lab.sweep.cluster.engine import Engine
from lora_lab.sweep.cluster.ray_tasks import RayTasks
from lora_lab.sweep.cluster.slurm import Slurm


def engine_of(asked: ClusterConfig, on_card: bool, folder: Path) -> Engine:
    """Return the cluster that was asked for.

    Args:
        on_card: whether each job needs a card.
        folder: gets the jobs' files; the nodes have to see it.

    Raises: InvalidInput when it cannot be used from here."""
    return RayTasks(asked, on_card) if asked.kind is ClusterKind.ray else Slurm(asked, on_card, folder)
