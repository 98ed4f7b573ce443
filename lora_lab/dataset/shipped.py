"""Name the files of rows that come with lora_lab."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "data"
SHIPPED = FOLDER / "lab_qa.jsonl"
"""The rows that are read where nothing else is chosen."""


def shipped_names() -> list[str]:
    """Return the names of all shipped files of rows."""
    return sorted(path.name for path in FOLDER.iterdir() if ".jsonl" in path.name)


def shipped_file(name: str | None) -> Path:
    """Return the path of a shipped file; the default one for None."""
    return SHIPPED if name is None else FOLDER / name
