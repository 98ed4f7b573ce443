"""Find what cannot be done where trials are to run: on several cards, or on the machines of a cluster."""

from lora_lab.config import AUTO, TrialConfig
from lora_lab.options import ClusterKind, Isolation, PlacementKind, Plan, TrackingKind


def slot_faults(config: TrialConfig) -> list[str]:
    """Find what placement=each_gpu cannot do, and what only it and ddp can."""
    asked, found = config.placement, []
    if asked.kind is PlacementKind.one:
        return [
            f"placement.{name}={value} has no effect with placement=one; leave it out, or choose placement=each_gpu."
            for name, value in (("gpus", asked.gpus), ("workers", asked.workers))
            if value is not None
        ]
    if asked.kind is not PlacementKind.each_gpu:
        return []
    if asked.gpus is not None and asked.workers is not None:
        found.append("placement.gpus counts cards and placement.workers shares of a CPU; give one of them.")
    if config.device not in ("auto", "cpu"):
        found.append(
            f"device={config.device} names one device, and placement=each_gpu uses several; leave one of them out, or "
            "show it the cards with CUDA_VISIBLE_DEVICES."
        )
    if config.repeats == AUTO:
        found.append(
            "repeats=auto compares trials that run one after the other on one card, and placement=each_gpu runs them "
            "on several; leave one of them out."
        )
    return found


def cluster_faults(config: TrialConfig) -> list[str]:
    """Find what cannot be done on the machines of a cluster."""
    asked = config.cluster
    found = [
        f"cluster.{key}={value} has no effect with cluster={asked.kind.name}; leave it out, or choose "
        f"cluster={kind.name}."
        for key, value, kind in (
            ("partition", asked.partition, ClusterKind.slurm),
            ("address", asked.address, ClusterKind.ray),
        )
        if value is not None and kind is not asked.kind
    ]
    if asked.kind is ClusterKind.local:
        return found
    name = f"cluster={asked.kind.name}"
    if asked.kind is ClusterKind.ray and asked.address is None:
        found.append("cluster.address is missing; give the head of the Ray cluster, cluster.address=10.0.0.1:6379.")
    if config.tracking.kind is TrackingKind.local:
        found.append(
            f"{name}: the sweep's folder lies on a network file system, on which an SQLite database gets damaged. Use "
            "tracking=server tracking.uri=http://HOST:5000, or tracking=none."
        )
    if config.placement.kind is not PlacementKind.one:
        found.append(f"{name} gives each trial a card of its own; leave placement={config.placement.kind.name} out.")
    if config.device not in ("auto", "cpu"):
        found.append(f"{name}: device={config.device} names a card, and the cluster chooses one; leave it out.")
    if config.repeats == AUTO:
        found.append(f"{name}: repeats=auto compares trials on one card; give a number of repeats.")
    if config.plan is Plan.fits:
        found.append(f"{name}: plan=fits looks at a card of this machine; leave it out.")
    if config.isolation is Isolation.inline:
        found.append(f"{name}: isolation=inline is for a debugger on this machine; leave it out.")
    return found
