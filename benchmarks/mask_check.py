"""Compare what lora_lab trains of a conversation with the marks that TRL has put into models' own chat templates.

    pip download --no-deps trl==1.15.0 && python -m benchmarks.mask_check OUT trl-1.15.0-py3-none-any.whl

TRL's package (Apache-2.0) holds the chat templates of models as their publishers have them, and a second file of each
in which the answers are marked for transformers' own mask. Both masks are taken of all 251 conversations of lab_chat,
with and without a system prompt, by one byte-level tokenizer that has the special tokens of all templates. No template
is stored here. Writes OUT/mask_check.json and .md.
"""

import json
import re
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from benchmarks.reports import markdown, provenance, stored, write_report
from lora_lab.dataset.row import Conversation, Role, Turn
from lora_lab.dataset.shipped import SHIPPED
from lora_lab.store.environment import environment

_TEMPLATES = {
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "phi3": "<|end|>",
    "phi3_5": "<|end|>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "glm4moe": "<|endoftext|>",
    "lfm2": "<|im_end|>",
}
"""Files of TRL, and the token that ends a turn."""
_SPECIAL = re.compile(r"<\|[^|<>\s]+\|>|<(?:start|end)_of_turn>|<bos>")
_WAYS = SAME, LINE_BREAK, OTHER_MASK, OTHER_TEXT, REFUSED = (
    "same",
    "same but for line breaks before or behind an answer, which TRL trains",
    "another mask",
    "another text",
    "refused by the template",
)
_SYSTEM = Turn(Role.system, "You are a helpful assistant who answers in few words.")


def tokenizer_for(template: str, eos: str) -> Any:
    """Return a byte-level tokenizer that has a template's special tokens."""
    from lora_lab.worker.tiny_tokenizer import tiny_tokenizer  # it imports torch, and table() needs none

    tokenizer: Any = tiny_tokenizer()
    special = sorted({*_SPECIAL.findall(template), eos, "<bos>"})
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(each, special=True) for each in special]})
    tokenizer.eos_token, tokenizer.bos_token = eos, "<bos>"
    tokenizer.chat_template = template
    return tokenizer


def conversations() -> list[Conversation]:
    """Return the shipped conversations, each without and with a system prompt."""
    lines = (SHIPPED.parent / "lab_chat.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [
        Conversation(tuple(Turn(Role[each["role"]], each["content"]) for each in json.loads(line)["messages"]))
        for line in lines
    ]
    plain = [Conversation(tuple(turn for turn in row.turns if turn.role is not Role.system)) for row in rows]
    return [*plain, *(Conversation((_SYSTEM, *row.turns)) for row in plain)]


def compared(tokenizer: Any, marked: str, row: Conversation, layout: Any) -> str:
    """Return how our mask of a conversation compares with that of the marked template, as one of _WAYS."""
    messages = [{"role": turn.role.name, "content": turn.text} for turn in row.turns]
    try:
        theirs = tokenizer.apply_chat_template(
            messages, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
        )
    except Exception:  # a template raises what it likes, for a system prompt that it has no place for
        return REFUSED
    ours = layout.lay_out(row)
    ids = list(ours.ids)
    if ids != list(theirs["input_ids"])[: len(ids)]:
        return OTHER_TEXT
    mask = [0] * len(ids)
    for start, end in ours.spans:
        mask[start:end] = [1] * (end - start)
    other = list(theirs["assistant_masks"])[: len(ids)]
    if mask == other:
        return SAME
    differing = [place for place in range(len(ids)) if mask[place] != other[place]]
    around_answers = all(
        tokenizer.decode([ids[place]]) == "\n" and not (mask[place] or (mask[place - 1] and mask[place + 1]))
        for place in differing
    )
    return LINE_BREAK if around_answers else OTHER_MASK


def main() -> None:
    from lora_lab.worker.conversation import Conversations  # it imports torch

    out, rows = Path(sys.argv[1]), conversations()
    found: dict[str, dict[str, int]] = {}
    with zipfile.ZipFile(sys.argv[2]) as package:
        for name, eos in _TEMPLATES.items():
            files = (f"trl/chat_templates/{each}.jinja" for each in (name, f"{name}_training"))
            plain, marked = (package.read(file).decode() for file in files)
            tokenizer = tokenizer_for(plain, eos)
            layout = Conversations(tokenizer)
            found[name] = dict(Counter(compared(tokenizer, marked, row, layout) for row in rows))
            print(name, found[name], flush=True)
    origin = provenance(environment(), f"python -m benchmarks.mask_check OUT {Path(sys.argv[2]).name}")
    write_report(out, "mask_check", "Masks next to TRL's marks", origin, table_of(found), {"found": found})


def table() -> str:
    """Return docs/data.md's table from the stored comparison."""
    return table_of(stored("cpu/mask_check")["found"])


def table_of(found: dict[str, dict[str, int]]) -> str:
    """Return a table with a line for each template."""
    lines = [[f"`{name}`", *(str(ways.get(way, 0)) for way in _WAYS)] for name, ways in found.items()]
    return markdown(["template", *_WAYS], lines)


if __name__ == "__main__":
    main()
