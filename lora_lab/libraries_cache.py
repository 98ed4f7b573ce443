"""Cache what CUDA's context and libraries took of this machine's card, as a trial measured it, for estimates."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_lab.config import TrialConfig
from lora_lab.files import read_json, write_json
from lora_lab.options import EngineKind
from lora_lab.paths import cache_folder


@dataclass(frozen=True, slots=True)
class LibrariesSeen:
    """What was measured on the card that was used last."""

    device: str
    """The card, its driver and torch; on another one nothing of this holds."""
    gib: Mapping[str, float]
    """`vram/other_gib` by `library_key`."""


def note_libraries(config: TrialConfig, tags: Mapping[str, str], metrics: Mapping[str, float]) -> None:
    """Remember what a finished trial measured, if it did. Of several trials the last one counts."""
    gib = metrics.get("vram/other_gib", 0.0)
    if gib > 0:  # below it where another program has ended meanwhile
        device = ", ".join(tags.get(key, "") for key in ("device", "device.driver", "version.torch"))
        is_paged = (config.optimizer.optim or "").startswith("paged_")
        store_libraries(device, library_key(config.engine.kind, is_paged), gib)


def library_key(engine: EngineKind, is_paged: bool) -> str:
    """Return what it depends on besides the device."""
    return f"{engine.name}{' paged' if is_paged else ''}"


def load_libraries() -> LibrariesSeen | None:
    """Return what is stored; None when there is nothing, or its file is damaged."""
    stored = read_json(_file())
    if not isinstance(stored, dict):
        return None
    device, gib = stored.get("device"), stored.get("gib")
    if not (isinstance(device, str) and isinstance(gib, dict) and gib):
        return None
    sizes = {str(key): float(size) for key, size in gib.items() if isinstance(size, int | float) and 0 < size < 100}
    return LibrariesSeen(device, sizes) if sizes else None


def store_libraries(device: str, key: str, gib: float) -> None:
    """Store a measurement atomically; those of another device are dropped. Write errors are ignored."""
    seen = load_libraries()
    others = seen.gib if seen is not None and seen.device == device else {}
    with contextlib.suppress(OSError):
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_json(_file(), {"device": device, "gib": {**others, key: gib}})


def _file() -> Path:
    return cache_folder() / "libraries.json"
