"""The part of the schema that names the machines of a sweep."""

from dataclasses import dataclass

from lora_lab.options import ClusterKind
from lora_lab.settings import setting


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """The machines that the trials of a sweep run on."""

    kind: ClusterKind = setting(ClusterKind.local, "local (this machine), slurm or ray")
    workers: int = setting(4, "how many trials run at a time on a cluster, each on one card", above=0, most=1000)
    address: str | None = setting(None, "the head of the Ray cluster, host:port")
    partition: str | None = setting(None, "Slurm's partition; by default the one that Slurm chooses")
    minutes: int = setting(
        60, "Slurm's time limit for each trial; two minutes earlier it ends as timed_out", least=5, most=525_600
    )
