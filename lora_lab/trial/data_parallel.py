"""Choose the cards, or the workers on the CPU, that share a trial: placement=ddp and placement=fsdp."""

from collections.abc import Mapping
from dataclasses import replace

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.options import PlacementKind
from lora_lab.placement import Placement
from lora_lab.telemetry.nvml import Card
from lora_lab.trial.devices import cards_here, choose_placement

_STRATEGIES = {PlacementKind.ddp: "data parallel", PlacementKind.fsdp: "data parallel, weights shared out"}


def placement_of(config: TrialConfig) -> Placement:
    """Return where a trial runs: with placement=ddp or fsdp on several cards or by several workers, else on one.

    Raises: InvalidInput when there are not as many cards, or they cannot share a trial."""
    asked = config.placement
    if not asked.kind.shares_trials:
        return choose_placement(config.device)
    there = () if config.device == "cpu" else cards_here(config.device)
    if there:
        cards = _cards(config, there)
        return Placement(cards=cards, world_size=len(cards), strategy=_STRATEGIES[asked.kind])
    if asked.gpus is not None:
        raise InvalidInput(
            f"placement={asked.kind.name} placement.gpus={asked.gpus}: there is no NVIDIA card here to use. On "
            "the CPU type placement.workers=2."
        )
    if asked.workers is None:
        raise InvalidInput(
            f"placement={asked.kind.name} shares a trial between cards, and there is no NVIDIA card here to use. "
            "On the CPU type placement.workers=2."
        )
    return Placement(world_size=asked.workers, strategy=_STRATEGIES[asked.kind])


def _cards(config: TrialConfig, there: tuple[Card, ...]) -> tuple[Card, ...]:
    asked = config.placement
    if asked.workers is not None:
        raise InvalidInput(
            f"placement.workers={asked.workers} is the number of workers on the CPU, and there are NVIDIA cards here. "
            "Use placement.gpus, or add device=cpu."
        )
    count = len(there) if asked.gpus is None else asked.gpus
    listed = ", ".join(f"gpu:{card.index} ({card.name})" for card in there)
    if count > len(there):
        raise InvalidInput(
            f"placement.gpus={count}: this machine shows {listed}. Use placement.gpus={len(there)} or fewer."
            if len(there) > 1
            else f"placement.gpus={count}: this machine shows {listed} alone. Use placement=one."
        )
    if count == 1:
        raise InvalidInput(
            f"placement={asked.kind.name} shares a trial between cards, and this machine shows {listed} alone. "
            "Use placement=one."
        )
    chosen = there[:count]
    if len({card.name for card in chosen}) > 1:
        raise InvalidInput(
            f"placement={asked.kind.name}: the cards are of different kinds ({listed}). Each waits for the slowest, "
            "and the weights drift apart by rounding. Choose equal ones with CUDA_VISIBLE_DEVICES."
        )
    return chosen


def check_same_number(placement: Placement, tags: Mapping[str, str]) -> None:
    """Raise InvalidInput when a job would go on with another number of workers, which has other rows in a step.

    Args:
        tags: of the job's record."""
    before = int(tags.get("world_size", "1"))
    if placement.world_size != before:
        raise InvalidInput(
            f"the job was trained by {before} workers, and {placement.world_size} would go on with it: a step would "
            f"have other rows. Show it {before} cards with CUDA_VISIBLE_DEVICES, or start a new job."
        )


def settled(config: TrialConfig, placement: Placement) -> TrialConfig:
    """Return the config with the number of workers that share the trial, as a worker reads it."""
    if not config.placement.kind.shares_trials:
        return config
    count, on_cards = placement.world_size, bool(placement.cards)
    found = replace(config.placement, gpus=count if on_cards else None, workers=None if on_cards else count)
    return replace(config, placement=found)
