"""The part of the schema that says where trials run: on which devices, and on which machines."""

from dataclasses import dataclass

from lora_lab.options import ClusterKind, PlacementKind
from lora_lab.settings import setting


@dataclass(kw_only=True, slots=True)
class PlacementConfig:
    """The devices that trials run on."""

    kind: PlacementKind = setting(PlacementKind.one, "one, each_gpu, ddp or fsdp")
    gpus: int | None = setting(None, "with each_gpu, ddp and fsdp, how many cards; by default all", above=0, most=1024)
    workers: int | None = setting(
        None, "with each_gpu, ddp and fsdp on the CPU, how many workers share its cores", above=0, most=1024
    )

    @property
    def world_size(self) -> int:
        """Return how many workers share a trial. Where neither number is given, all cards are asked for, and only the
        parent knows how many there are: it settles the number before a worker starts."""
        return (self.gpus or self.workers or 1) if self.kind.shares_trials else 1


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
