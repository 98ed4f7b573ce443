"""The words that this project no longer uses: docs/glossary.md has those it does."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORDS = re.compile(
    r"can't be had|could not be had|\banew\b|\bthe like\b|\bso many\b|\bwhat it is of\b|\bin place of\b|\baloud\b", re.I
)
TEXTS = [
    *(path for kind in ("py", "yaml", "j2") for path in (ROOT / "lora_lab").rglob(f"*.{kind}")),
    *(ROOT / "conf").rglob("*.yaml"),
    *(ROOT / "docs").glob("*.md"),
    ROOT / "README.md",
]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_texts_are_in_plain_english(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if WORDS.search(line)] == []
