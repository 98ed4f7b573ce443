"""Facts about where a trial ran: versions, machine, commit. This module imports none of the packages it describes."""

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import psutil

from lora_lab import __version__
from lora_lab.machine import cpu_name
from lora_lab.placement import Placement
from lora_lab.store.code_digest import PACKAGE, code_digest, deciding_files, telemetry_digest

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "hydra-core", "mlflow-skinny")


def environment() -> dict[str, str]:
    """Return plain facts by dotted name. They are looked up once per process. An unknown fact says so in its value."""
    return dict(_facts())


def device_facts(placement: Placement) -> dict[str, str]:
    """Describe the device that computes: one or more cards, this machine's CPU, or some of its cores; and how many
    workers share it. The memory is that of the smallest card."""
    cards = placement.cards
    shared = {"world_size": str(placement.world_size)} if placement.world_size > 1 else {}
    if not cards:
        share = {"device.cores": str(len(placement.cores))} if placement.cores else {}
        return {"device": f"cpu ({platform.machine()})", "device.cpu": cpu_name(), **share, **shared}
    return {
        **shared,
        "device": placement.name,
        "device.uuid": ",".join(card.uuid for card in cards),
        "device.driver": cards[0].driver,
        "device.memory_gib": f"{min(card.total_bytes for card in cards) / 2**30:.1f}",
    }


@functools.cache
def _facts() -> dict[str, str]:
    facts = {"version.lora_lab": __version__, "version.python": platform.python_version()}
    for name in _PACKAGES:
        try:
            facts[f"version.{name.removesuffix('-skinny')}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[f"version.{name}"] = "not installed"
    commit, dirty = _commit()
    facts |= {
        "code": code_digest(),
        "code.telemetry": telemetry_digest(),
        "commit": commit,
        "dirty": dirty,
        "machine.os": platform.platform(),
        "machine.cpu": cpu_name(),
        "machine.cpu_count": str(os.cpu_count()),
        "machine.memory_gib": f"{psutil.virtual_memory().total / 2**30:.1f}",
    }
    return facts


def _commit() -> tuple[str, str]:
    """Return this code's commit, and 'true' or 'false' for uncommitted changes in the files that decide a figure.

    Outside a clone both values say so."""
    try:
        top = Path(_git("rev-parse", "--show-toplevel"))
        if top != PACKAGE.parent:  # installed inside the repository of another project
            raise FileNotFoundError
        changes = _git("status", "--porcelain", "--", *map(str, deciding_files()))
        return _git("rev-parse", "HEAD"), "true" if changes else "false"
    except (OSError, subprocess.SubprocessError):
        return "not a git clone", "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(PACKAGE), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()
