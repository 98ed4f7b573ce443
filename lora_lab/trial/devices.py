"""Choose the cards that a trial runs on, and check that they can do what is asked."""

import importlib.util
import os
import re
import shutil
import sysconfig
from pathlib import Path

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.fit.optimizer import OURS, rounds_in_our_kernel
from lora_lab.machine import CORES
from lora_lab.options import Checkpointing, DType, EngineKind
from lora_lab.outcome import Unsupported
from lora_lab.placement import Placement
from lora_lab.telemetry.nvml import Card, visible_cards
from lora_lab.telemetry.sampler import SensorFailed
from lora_lab.trial.variables import of_worker

_NEEDS_CAPABILITY = {DType.bf16: (8, 0), DType.fp16: (5, 3)}
"""The lowest CUDA compute capability of cards that calculate in that format."""


def choose_placement(device: str) -> Placement:
    """Return a placement of one worker on the card that `device` names, or on the CPU.

    Raises: InvalidInput when there is no such card."""
    card = None if device == "cpu" else _choose_card(device)
    return Placement(cards=(card,) if card else ())


def cards_here(device: str = "auto") -> tuple[Card, ...]:
    """Return the cards that this process may use.

    Args:
        device: what the user asked for.

    Raises: InvalidInput when the driver does not answer."""
    try:
        return tuple(visible_cards())
    except SensorFailed as error:
        raise InvalidInput(
            f"device={device}: this machine's NVIDIA driver does not answer ({error}). Repair it (after a driver "
            "update a reboot often helps), or use device=cpu."
        ) from error


def _choose_card(device: str) -> Card | None:
    there = cards_here(device)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device == "auto" and not there and hidden:
        raise InvalidInput(
            f"device=auto: CUDA_VISIBLE_DEVICES={hidden} names no card of this machine. Unset it, name a card as "
            "nvidia-smi -L does, or use device=cpu."
        )
    if device == "auto":
        return there[0] if there else None
    numbered = re.fullmatch(r"gpu:(\d+)", device)
    for card in there:
        if card.uuid == device or (numbered and card.index == int(numbered[1])):
            return card
    listed = ", ".join(f"gpu:{card.index} ({card.name}, {card.uuid})" for card in there) or "no NVIDIA card"
    limit = os.environ.get("CUDA_VISIBLE_DEVICES")
    within = "" if limit is None else f" within CUDA_VISIBLE_DEVICES={limit!r}"
    raise InvalidInput(
        f"device={device} is not there; this machine shows {listed}{within}. Use device=auto or device=cpu."
    )


def worker_environment(placement: Placement) -> dict[str, str]:
    """Return the variables that show a worker the cards of its trial, and hide the others; of a worker with a share of
    the CPU also its cores."""
    share = {CORES: ",".join(map(str, placement.cores))} if placement.cores else {}
    return of_worker(",".join(card.uuid for card in placement.cards)) | share


def check_capable(config: TrialConfig, placement: Placement) -> None:
    """Raise Unsupported when the trial cannot run here. A card may not calculate in the trial's precision or may have
    less memory than vram_limit_gib, or the machine may lack what the trial's engine needs."""
    _check_engine(config.engine.kind, bool(placement.cards))
    if placement.cards:
        _check_kernels(config)
    else:
        _check_cpu(config)
    for card in placement.cards:
        _check_card(config, card)


def _check_cpu(config: TrialConfig) -> None:
    if config.gradient_checkpointing is Checkpointing.offloaded:
        raise Unsupported(
            "gradient_checkpointing=offloaded moves the input of each layer from a card to host memory, and this "
            "trial runs on the CPU. Use gradient_checkpointing=full."
        )
    if config.engine.host_embeddings is True:
        raise Unsupported(
            "engine.host_embeddings=true moves the embeddings from a card to host memory, and this trial runs on the "
            "CPU. Use engine.host_embeddings=auto."
        )
    if config.engine.host_layers:
        raise Unsupported(
            f"engine.host_layers={config.engine.host_layers} moves weights from a card to host memory, and this trial "
            "runs on the CPU. Use engine.host_layers=0."
        )
    limit = config.vram_limit_gib
    if limit is not None:
        raise Unsupported(f"vram_limit_gib={limit:g} limits an NVIDIA card, and this trial runs on the CPU.")


def _check_card(config: TrialConfig, card: Card) -> None:
    limit = config.vram_limit_gib
    if limit is not None and limit * 2**30 > card.total_bytes:
        has = card.total_bytes / 2**30
        raise Unsupported(f"vram_limit_gib={limit:g} is more than {card.name} has ({has:.1f} GiB).")
    needed = _NEEDS_CAPABILITY.get(config.precision.dtype)
    if needed is None or card.compute_capability >= needed:
        return
    have = ".".join(map(str, card.compute_capability))
    other = "precision=fp16 or precision=fp32" if config.precision.dtype is DType.bf16 else "precision=fp32"
    raise Unsupported(
        f"precision={config.precision.dtype.name} needs compute capability {needed[0]}.{needed[1]}; "
        f"{card.name} has {have}. Use {other}."
    )


def _check_engine(kind: EngineKind, on_card: bool) -> None:
    if not on_card and kind in (EngineKind.liger, EngineKind.graph):
        needs = "liger-kernel's kernels are Triton's" if kind is EngineKind.liger else "CUDA graphs are NVIDIA's"
        raise Unsupported(
            f"engine={kind.name} needs an NVIDIA GPU ({needs}), and this trial runs on the CPU. "
            "Use engine=eager or engine=compile."
        )
    if kind is EngineKind.liger and importlib.util.find_spec("liger_kernel") is None:
        raise Unsupported(
            "engine=liger needs the package liger-kernel, which is not installed. Type:\n"
            "  pip install 'liger-kernel>=0.8'\nor use engine=eager."
        )
    if kind in (EngineKind.compile, EngineKind.graph):
        missing = missing_to_compile(on_card)
        if missing:
            raise Unsupported(
                f"engine={kind.name} compiles code on this machine, and there is no {' and no '.join(missing)}. "
                "Install what is missing (on Debian and Ubuntu: apt install build-essential python3-dev), or use "
                "engine=eager."
            )
        spaced = None if on_card else folder_with_a_space()
        if spaced:
            raise Unsupported(
                f"engine={kind.name} on the CPU: torch passes the paths of its folder and its cache to the compiler "
                f"unquoted, and there is a space in {spaced}. Use an environment and a cache "
                "(TORCHINDUCTOR_CACHE_DIR) without spaces in their paths, or engine=eager."
            )


def _check_kernels(config: TrialConfig) -> None:
    """Raise Unsupported where an optimizer's own kernel cannot be built."""
    rounds = config.method.held_in is DType.bf16 and rounds_in_our_kernel(config.optimizer)
    missing = missing_to_compile(on_card=True) if rounds or config.optimizer.target == OURS else []
    if missing:
        raise Unsupported(
            f"the optimizer's kernel is built on this machine, and there is no {' and no '.join(missing)}. Install "
            "what is missing (on Debian and Ubuntu: apt install build-essential python3-dev), or use "
            "optimizer=adamw_8bit."
        )


def folder_with_a_space() -> str | None:
    """Return a path with a space among those that torch passes to g++; None when none has one."""
    torch = importlib.util.find_spec("torch")
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or of_worker("")["TORCHINDUCTOR_CACHE_DIR"]
    return next((place for place in (torch and torch.origin, cache) if place and " " in place), None)


def missing_to_compile(on_card: bool) -> list[str]:
    """Return what torch.compile and Triton lack here, in words for the user. Triton builds its launchers in C; kernels
    for a CPU are C++."""
    variable, language, known = ("CC", "C", ("gcc", "clang")) if on_card else ("CXX", "C++", ("g++",))
    named = os.environ.get(variable)
    missing = []
    if named and not shutil.which(named):
        missing.append(f"{variable}={named}")
    elif not named and not any(map(shutil.which, known)):
        missing.append(f"{language} compiler ({' or '.join(known)}; {variable}=... names another)")
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").is_file():
        missing.append(f"Python.h in {headers}")
    return missing
