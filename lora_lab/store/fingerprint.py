"""Decide what makes two trials the same: their config, and the conditions they ran under."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.data_config import SourceConfig
from lora_lab.dataset.shipped import shipped_file
from lora_lab.dataset.sources import files_of_path, heldout_file
from lora_lab.options import DataSource, ModelSource, PlacementKind, Weights
from lora_lab.placement import Placement
from lora_lab.segments import are_expandable
from lora_lab.settings import Effect, settings_of
from lora_lab.store.environment import device_facts, environment
from lora_lab.store.record import plain

_DECISIVE = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "python", "lora_lab")


def point_digest(config: TrialConfig) -> str:
    """Return the digest of the resolved config, without settings that cannot change a result."""
    decisive = plain(config)
    if config.placement.kind is PlacementKind.each_gpu:  # each trial runs as with placement=one, on one device
        decisive["placement"] = plain(TrialConfig())["placement"]
    for each in settings_of(TrialConfig):
        if each.effect is Effect.none:
            *groups, name = each.key.split(".")
            node = decisive
            for group in groups:
                node = node[group]
            del node[name]
    if not config.train.is_job:
        del decisive["train"]  # settings of a job change nothing in a window
    return digest(decisive)


def conditions(config: TrialConfig, placement: Placement) -> dict[str, str]:
    """Return what decides a trial's result besides the config: code, packages, device, how its memory is taken, content
    of data and model. Cards of one name and memory are alike: which of them it was is noted with the trial."""
    facts = environment()
    device = {name: fact for name, fact in device_facts(placement).items() if name != "device.uuid"}
    decisive = {f"version.{name}": facts[f"version.{name}"] for name in _DECISIVE}
    # on a card: by gigabytes for a large model
    segments = {"segments": "expandable" if are_expandable() else "fixed"} if placement.cards else {}
    return {**decisive, "code": facts["code"], **segments, **device, **_contents(config)}


def digest(content: object) -> str:
    """Return the first 16 hexadecimal digits of a sha256 over plain data. The order of keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _contents(config: TrialConfig) -> dict[str, str]:
    found = {}
    if config.data.source is DataSource.shipped:
        found["data"] = _file_digest(shipped_file(config.data.path))
    elif config.data.source is DataSource.file:
        sources = config.data.sources or [SourceConfig(path=str(config.data.path), split=config.data.split)]
        each = [_source_digest(source) for source in sources]
        found["data"] = each[0] if len(each) == 1 else digest(each)
    elif config.data.source is DataSource.hub:
        found["data"] = _hub_commit("dataset", str(config.data.id), config.data.revision)
    if config.data.heldout_path is not None:
        found["data.heldout"] = _path_digest(str(heldout_file(config.data)), None)
    if config.model.weights is Weights.pretrained:
        if config.model.source is ModelSource.local:
            found["model"] = _folder_digest(Path(str(config.model.path)))
        elif config.model.source is ModelSource.hub:
            found["model"] = _hub_commit("model", str(config.model.id), config.model.revision)
    return found


def _source_digest(source: SourceConfig) -> str:
    if source.id is not None:
        return _hub_commit("dataset", source.id, source.revision)
    return _path_digest(str(source.path), source.split)


def _path_digest(path: str, split: str | None) -> str:
    """Return the digest of a file, or of the files that a folder is read from, whatever they are called."""
    try:
        files, _ = files_of_path(Path(path), split, "data.path")
    except InvalidInput:
        return "missing"
    each = [_file_digest(file.path) for file in files]
    return each[0] if len(each) == 1 else digest(each)


def _file_digest(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError:
        return "missing"
    return _digest_of((path, stat.st_size, stat.st_mtime_ns))


@functools.cache
def _digest_of(state: tuple[Path, int, int]) -> str:
    """Hash a file once for each path, size and time of change."""
    with state[0].open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def _folder_digest(folder: Path) -> str:
    """Return the digest of a local model.

    Small files count by content. Weights count by size and time, because hashing 15 GB takes a minute."""
    parts: list[Any] = []
    for path in sorted(folder.glob("*")):
        if path.suffix == ".json":
            parts.append((path.name, _file_digest(path)))
        elif path.is_file():
            parts.append((path.name, path.stat().st_size, path.stat().st_mtime_ns))
    return digest(parts)


def _hub_commit(kind: str, name: str, revision: str | None) -> str:
    """Return the commit that `revision` means in the local cache, or `revision` before the first download."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    asked = revision or "main"
    ref = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind) / "refs" / asked
    return ref.read_text(encoding="ascii").strip() if ref.is_file() else asked
