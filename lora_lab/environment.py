"""Where a trial ran: versions, machine, commit. Imports none of what it describes."""

import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import psutil

from lora_lab import __version__
from lora_lab.machine import cpu_name
from lora_lab.telemetry.nvml import Card

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "hydra-core", "mlflow-skinny")


def environment() -> dict[str, str]:
    """Plain facts by dotted name, looked up once a process. What cannot be known says so."""
    return dict(_facts())


def device_facts(card: Card | None) -> dict[str, str]:
    """The device that calculates: a card, or this machine's CPU."""
    if card is None:
        return {"device": f"cpu ({platform.machine()})", "device.cpu": cpu_name()}
    return {
        "device": card.name,
        "device.uuid": card.uuid,
        "device.driver": card.driver,
        "device.memory_gib": f"{card.total_bytes / 2**30:.1f}",
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
        "code": _code_digest(),
        "commit": commit,
        "dirty": dirty,
        "machine.os": platform.platform(),
        "machine.cpu": cpu_name(),
        "machine.cpu_count": str(os.cpu_count()),
        "machine.memory_gib": f"{psutil.virtual_memory().total / 2**30:.1f}",
    }
    return facts


def _code_digest() -> str:
    """sha256 over this package's Python files: what ran, whatever git says about it."""
    package = Path(__file__).resolve().parent
    sha = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        sha.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return sha.hexdigest()[:16]


def _commit() -> tuple[str, str]:
    """(commit, 'true' or 'false' for uncommitted changes) of this code, where it runs from a clone."""
    package = Path(__file__).resolve().parent
    try:
        top = Path(_git(package, "rev-parse", "--show-toplevel"))
        if top != package.parent:  # installed into somebody else's repository
            raise FileNotFoundError
        return _git(package, "rev-parse", "HEAD"), "true" if _git(package, "status", "--porcelain") else "false"
    except (OSError, subprocess.SubprocessError):
        return "not a git clone", "unknown"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()
