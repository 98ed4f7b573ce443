"""The slots of a sweep with placement=each_gpu: the cards, or equal shares of the CPU's cores, each for one trial at a
time."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import DictConfig

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.options import Isolation, PlacementKind
from lora_lab.placement import Placement, in_ranges
from lora_lab.sweep.plan import GridPoint
from lora_lab.telemetry.nvml import Card
from lora_lab.trial.devices import cards_here, choose_placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Where one trial runs at a time."""

    name: str
    """As messages and records have it: gpu:1, or cores 0-3."""
    placement: Placement


def slots_of(config: TrialConfig) -> list[Slot]:
    """Return the slots for trials with this config; none unless placement=each_gpu.

    Raises: InvalidInput when this machine has not what was asked for."""
    asked = config.placement
    if asked.kind is not PlacementKind.each_gpu:
        return []
    if config.isolation is Isolation.inline:
        raise InvalidInput(
            "isolation=inline runs a trial inside this process, and placement=each_gpu runs several at once. Leave one "
            "of them out."
        )
    cards = () if config.device == "cpu" else cards_here()
    if cards and asked.workers is not None:
        raise InvalidInput(
            f"placement.workers={asked.workers} divides the cores of a machine without cards, and this one has "
            f"{len(cards)}. Use placement.gpus={min(asked.workers, len(cards))}, or add device=cpu."
        )
    return _on_cards(cards, asked.gpus) if cards else _on_cores(asked.gpus, asked.workers)


def check_side_by_side(points: Sequence[GridPoint], config: DictConfig) -> None:
    """Raise InvalidInput for a sweep whose trials cannot run side by side.

    Args:
        config: what Hydra composed without the points' overrides."""
    kinds = {point.config.placement.kind for point in points}
    if PlacementKind.each_gpu not in kinds:
        return
    if len({str(point.config.placement) + point.config.device for point in points}) > 1:
        raise InvalidInput(
            "placement=each_gpu holds for a whole sweep; give placement and device one value each for all points."
        )
    searched = next((point.searched for point in points if point.searched), "")
    if searched:
        raise InvalidInput(
            f"{searched}=max tries one value after the other, each chosen by the one before. Leave "
            "placement=each_gpu out."
        )
    launcher = config.hydra.runtime.choices.get("hydra/launcher")
    if launcher not in (None, "basic"):
        raise InvalidInput(
            f"hydra/launcher={launcher} and placement=each_gpu both spread trials; leave one of them out."
        )
    if config.hydra.job.env_set:
        raise InvalidInput(
            "hydra.job.env_set sets variables for one trial at a time, and placement=each_gpu runs several. Set them "
            "before the command."
        )


def whole(slots: list[Slot]) -> Placement:
    """Return all slots together."""
    return Placement(
        cards=tuple(card for slot in slots for card in slot.placement.cards),
        cores=tuple(core for slot in slots for core in slot.placement.cores),
    )


def placement_in_sweep(config: TrialConfig) -> Placement:
    """Return where a trial of a sweep with this config runs: of several slots the first, which is like the others.

    Raises: InvalidInput."""
    slots = slots_of(config)
    return slots[0].placement if slots else choose_placement(config.device)


def _on_cards(cards: tuple[Card, ...], most: int | None) -> list[Slot]:
    listed = ", ".join(f"gpu:{card.index} ({card.name})" for card in cards)
    if most is not None and most > len(cards):
        raise InvalidInput(f"placement.gpus={most} is more than there are: {listed}. Use fewer, or leave it out.")
    chosen = cards[:most]
    if len({(card.name, card.total_bytes) for card in chosen}) > 1:
        raise InvalidInput(
            f"placement=each_gpu spreads one sweep over cards of one kind, and this machine shows {listed}. Points on "
            "different cards could not be compared. Show it cards that are alike with CUDA_VISIBLE_DEVICES, or choose "
            "one with device=gpu:N."
        )
    return [Slot(name=f"gpu:{card.index}", placement=Placement(cards=(card,))) for card in chosen]


def _on_cores(gpus: int | None, workers: int | None) -> list[Slot]:
    if gpus is not None:
        raise InvalidInput(
            f"placement.gpus={gpus} counts cards, and these trials run on the CPU. Use placement.workers={gpus}."
        )
    cores = sorted(os.sched_getaffinity(0))
    if workers is None:
        raise InvalidInput(
            f"placement=each_gpu on the CPU needs the number of trials that share its cores ({len(cores)} here), for "
            f"example placement.workers={min(2, len(cores))}. Each is as fast as its share lets it be."
        )
    if workers > len(cores):
        raise InvalidInput(
            f"placement.workers={workers} is more than the cores that this process may use ({len(cores)}). Use at "
            f"most placement.workers={len(cores)}."
        )
    each = len(cores) // workers  # equal shares, as figures of unequal ones could not be compared
    shares = [tuple(cores[each * number : each * (number + 1)]) for number in range(workers)]
    return [Slot(name=in_ranges(share), placement=Placement(cores=share)) for share in shares]
