"""Write lora_lab's general text: passages of Python's own documentation, as the interpreter that runs this has it.

python -m benchmarks.general_text lora_lab/dataset/data     (CPython 3.11.7 gives the shipped file)
"""

import gzip
import json
import re
import sys
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path
from pydoc_data.topics import topics

SHORTEST, LONGEST = 100, 300
"""Words of a passage."""
_NO_PROSE = re.compile(r"::=|>>>|[+|>]|See also|\(?\[?[0-9]|[-*+] ")
"""What grammar, tables, code, footnotes and lists hold or begin with."""
_LETTERS = 0.9
"""The least share of letters and spaces in prose."""


def main(folder: Path) -> None:
    """Write general_text.jsonl.gz: passages of all topics in turn, so that the first ones are of many topics too."""
    seen: set[str] = set()
    of_topics = [list(passages(name, seen)) for name in sorted(topics)]
    in_turn = filter(None, chain.from_iterable(zip_longest(*of_topics)))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in in_turn)
    (folder / "general_text.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))


def passages(name: str, seen: set[str]) -> Iterator[dict[str, str]]:
    """Join a topic's paragraphs of prose, as they follow each other, to passages of SHORTEST to LONGEST words."""
    gathered: list[str] = []
    for paragraph in paragraphs(topics[name]):
        if paragraph in seen:
            continue
        seen.add(paragraph)
        gathered.append(paragraph)
        words = sum(len(text.split()) for text in gathered)
        if words >= SHORTEST:
            if words <= LONGEST:
                yield {"text": "\n\n".join(gathered), "topic": name}
            gathered = []


def paragraphs(text: str) -> Iterator[str]:
    """Return the paragraphs of at least 15 words that are prose, each on one line."""
    for block in re.split(r"\n\s*\n", text):
        plain = " ".join(block.split())
        letters = sum(character.isalpha() or character == " " for character in plain)
        prose = plain.endswith(".") and not _NO_PROSE.match(plain) and "::=" not in plain
        if prose and len(plain.split()) >= 15 and letters >= _LETTERS * len(plain):
            yield plain


if __name__ == "__main__":
    main(Path(sys.argv[1]))
