"""Name what the tokens of a data set depend on, so that a cached entry is only ever found by what it was made of."""

import functools
import hashlib
import importlib.metadata
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lora_lab
from lora_lab.config import TrialConfig
from lora_lab.dataset.sources import content_files
from lora_lab.options import DataSource

LEAST_BYTES = 2**19
"""Smaller data is not cached: its tokens take about a second. 0.75 MB took 3.6 s of each trial on a card's host."""

LEAST_ROWS = 2000
"""With a smaller `data.rows` nothing is cached either."""

_PACKAGES = ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow", "datasketch")
_AFTERWARDS = ("batching", "min_perplexity")
"""Settings of the data that change nothing before rows are put into batches."""

State = tuple[tuple[Path, int, int], ...]
"""Path, size in bytes and time of change of each file that rows are read from."""


def state_of(config: TrialConfig) -> State:
    """Return what changes when a file of rows does; empty for data that is not worth caching.

    Raises: InvalidInput for a folder or data set that cannot be read."""
    data = config.data
    if data.source is DataSource.random_tokens or (data.rows is not None and data.rows < LEAST_ROWS):
        return ()
    found = _look_at(content_files(data))
    return found if sum(size for _, size, _ in found) >= LEAST_BYTES else ()


def is_unchanged(state: State) -> bool:
    """Return whether the files are still as they were."""
    return _look_at([path for path, *_ in state]) == state


def _look_at(files: list[Path]) -> State:
    try:
        return tuple((path, status.st_size, status.st_mtime_ns) for path in files for status in [path.stat()])
    except (OSError, ValueError):  # reading will name it
        return ()


def key_of(config: TrialConfig, state: State, tokenizer: Any, vocab_size: int) -> str | None:
    """Return the name of an entry: a digest of all that its tokens depend on. None where a file cannot be read, and for
    a tokenizer that no one text describes, as those written in Python."""
    described = _described(tokenizer)
    if described is None:
        return None
    try:
        contents = [_digest_of(each) for each in state]
    except OSError:  # reading will name it
        return None
    settings = {name: value for name, value in asdict(config.data).items() if name not in _AFTERWARDS}
    parts = {
        "files": contents,
        "data": settings,
        "seq_len": config.seq_len,
        "vocab_size": vocab_size,
        "tokenizer": described,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "code": _code_digest(),
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:32]


@functools.cache
def _digest_of(state: tuple[Path, int, int]) -> str:
    """Hash a file once for each path, size and time of change."""
    with state[0].open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _described(tokenizer: Any) -> dict[str, Any] | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    is_known = type(tokenizer).__module__.startswith("transformers.")  # a model's own code may change
    if backend is None or not is_known:
        return None
    # texts among them are where it was loaded from, or are named below
    flags = {name: value for name, value in tokenizer.init_kwargs.items() if isinstance(value, bool | int)}
    return {
        "class": type(tokenizer).__name__,
        "backend": hashlib.sha256(backend.to_str().encode()).hexdigest(),
        "template": tokenizer.chat_template,
        "special": tokenizer.special_tokens_map,
        "flags": flags,
    }


@functools.cache
def _code_digest() -> str:
    """Return the digest of the source that reads rows and lays them out."""
    sha = hashlib.sha256()
    package = Path(lora_lab.__file__).parent
    for path in sorted([*package.glob("*.py"), *package.glob("dataset/*.py"), *package.glob("worker/*.py")]):
        sha.update(path.read_bytes())
    return sha.hexdigest()
