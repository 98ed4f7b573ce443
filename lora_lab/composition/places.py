"""Find what cannot be done where trials are to run: on several cards, or on the machines of a cluster."""

from lora_lab.config import AUTO, TrialConfig
from lora_lab.options import ClusterKind, EngineKind, Isolation, PlacementKind, Plan, TrackingKind


def slot_faults(config: TrialConfig) -> list[str]:
    """Find what placement=each_gpu cannot do, and what only it, ddp and fsdp can."""
    asked, found = config.placement, []
    if asked.kind is PlacementKind.one:
        return [
            f"placement.{name}={value} has no effect with placement=one. Leave it out, or choose placement=each_gpu or "
            "placement=ddp."
            for name, value in (("gpus", asked.gpus), ("workers", asked.workers))
            if value is not None
        ]
    if asked.kind is not PlacementKind.each_gpu:
        return []
    found += _several_devices_faults(config)
    if config.repeats == AUTO:
        found.append(
            "repeats=auto compares trials that run one after the other on one card, and placement=each_gpu runs them "
            "on several; leave one of them out."
        )
    return found


def data_parallel_faults(config: TrialConfig) -> list[str]:
    """Find what a trial over several cards cannot have."""
    asked = config.placement
    if not asked.kind.shares_trials:
        return []
    name = f"placement={asked.kind.name}"
    found = [
        f"{name} placement.{number}=1 shares a trial with nobody. Use placement=one."
        for number in ("gpus", "workers")
        if getattr(asked, number) == 1
    ]
    found += _several_devices_faults(config)
    if config.device == "cpu" and asked.gpus is not None:
        found.append(f"placement.gpus={asked.gpus} with device=cpu: on the CPU type placement.workers={asked.gpus}.")
    if config.isolation is Isolation.inline:
        found.append(f"isolation=inline is one process, and {name} needs several. Use isolation=process.")
    return found


def sharding_faults(config: TrialConfig) -> list[str]:
    """Find what a trial cannot have whose frozen weights are shared out between cards."""
    if config.placement.kind is not PlacementKind.fsdp:
        return []
    engine, method, found = config.engine, config.method, []
    if engine.kind is EngineKind.graph:
        found.append(
            "engine=graph replays a step at fixed places in memory, and placement=fsdp gives a layer's weights another "
            "place in each step. Use engine=compile, or placement=ddp."
        )
    if engine.kind is EngineKind.liger:
        found.append(
            "engine=liger calculates the loss with the head's weights by itself, and placement=fsdp gathers weights "
            "for the model's own calls. Use engine=compile engine.chunked_loss=true, or placement=ddp."
        )
    if engine.host_layers:
        found.append(
            f"engine.host_layers={engine.host_layers} keeps weights in host memory, and placement=fsdp on several "
            "cards; use engine.host_layers=0, or placement=one."
        )
    if engine.host_embeddings is True:
        found.append(
            "engine.host_embeddings=true keeps the embeddings in host memory, and placement=fsdp shares them out; use "
            "engine.host_embeddings=false, or placement=ddp."
        )
    if method.use_dora:
        found.append(
            "method.use_dora=true starts from the norms of whole weights, which placement=fsdp has on no card. Use "
            "method.use_dora=false, or placement=ddp."
        )
    if method.raise_to_fp32:
        found.append(
            "method.raise_to_fp32=true makes larger weights of some, behind their loading, and placement=fsdp has "
            "shared them out by then. Use method.raise_to_fp32=false, or placement=ddp."
        )
    return found


def _several_devices_faults(config: TrialConfig) -> list[str]:
    """Find what no placement on several devices can have."""
    asked, found = config.placement, []
    if asked.gpus is not None and asked.workers is not None:
        found.append(
            f"placement.gpus={asked.gpus} and placement.workers={asked.workers} are both set: gpus counts cards, "
            "workers is for the CPU; give one of them."
        )
    if config.device not in ("auto", "cpu"):
        found.append(
            f"device={config.device} names one card, and placement={asked.kind.name} uses several. Leave it out; "
            "CUDA_VISIBLE_DEVICES chooses among the cards."
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
