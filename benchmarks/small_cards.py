"""Run trials within emulated small cards, each alone on the card: what trains there, and how fast.

    python -m benchmarks.small_cards OUT [--seconds 300] [--have FILE ...] [--only WORD]
    python -m benchmarks.small_cards said OUT          the longest rows that lora_lab.fit names; needs no card

Writes OUT/small_cards.json after every trial; a later call goes on with what earlier files (--have) do not have.
"""

import argparse
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.compose import compose
from benchmarks.fit_cases import COMMON, MODELS
from benchmarks.fit_memory import Case, Run, earlier
from benchmarks.reports import markdown, stored
from lora_lab.files import write_json
from lora_lab.fit.estimate import GIB, estimate
from lora_lab.fit.search import Search
from lora_lab.fit.shapes import shapes_of

_SHAPES = {
    **{name: MODELS[name] for name in ("llama3.1", "qwen2.5")},
    "llama2-13b": [
        *MODELS["llama3.1"],
        "model.architecture.vocab_size=32000",
        "model.architecture.hidden_size=5120",
        "model.architecture.intermediate_size=13824",
        "model.architecture.num_hidden_layers=40",
        "model.architecture.num_attention_heads=40",
        "model.architecture.num_key_value_heads=40",
    ],
    "llama3.1-70b": [
        *MODELS["llama3.1"],
        "model.architecture.hidden_size=8192",
        "model.architecture.intermediate_size=28672",
        "model.architecture.num_hidden_layers=80",
        "model.architecture.num_attention_heads=64",
    ],
    "qwen2.5-7b": [
        *MODELS["qwen2.5"],
        "model.architecture.vocab_size=152064",
        "model.architecture.hidden_size=3584",
        "model.architecture.intermediate_size=18944",
        "model.architecture.num_attention_heads=28",
        "model.architecture.num_key_value_heads=4",
        "model.architecture.tie_word_embeddings=false",
    ],
}
_TITLES = {
    "llama3.1": "Llama-3.1-8B",
    "qwen2.5": "Qwen2.5-1.5B",
    "llama2-13b": "Llama-2-13B",
    "llama3.1-70b": "Llama-3.1-70B",
    "qwen2.5-7b": "Qwen2.5-7B",
}
_RANK_32 = "method=qlora method.rank=32 optimizer=adamw_8bit"
_TILED = "engine=graph memory=lean engine.mlp_tile=4096"
_LONG = f"{_RANK_32} {_TILED}"
_QLORA = "method=qlora engine=graph"
_FULL = f"{_QLORA} gradient_checkpointing=full"
_LORA = "method=lora engine=graph grad_accum_steps=16"


_SHORT, _LONGEST = 8192, 40000
"""Rows up to the first length have ten measured steps, those above the second one: it takes many seconds."""


@dataclass(frozen=True)
class Small:
    """A trial on a small card."""

    model: str
    rows: int
    length: int
    card: int | None
    """In GiB; None is the whole card."""
    settings: str

    @property
    def name(self) -> str:
        """Return model, batch, settings and card."""
        return f"{self.model} {self.rows}x{self.length} on {self.card or 'all'}: {self.settings}"


_HOSTED = f"{_QLORA} memory=leanest engine.host_layers=all"
CASES = (
    Small("llama3.1", 1, 2048, 4, _HOSTED),
    Small("llama3.1", 1, 6144, 8, _LONG),
    Small("llama3.1", 1, 32768, 12, _LONG),
    Small("llama3.1", 1, 41000, 12, _LONG),
    Small("llama3.1", 1, 56000, 16, _LONG),
    Small("llama3.1", 1, 80000, 24, _LONG),
    Small("llama3.1", 4, 2048, 6, _HOSTED),
    Small("llama2-13b", 1, 2048, 12, f"{_QLORA} memory=leanest"),
    Small("llama2-13b", 1, 2048, 4, _HOSTED),
    Small("llama3.1-70b", 1, 2048, 12, _HOSTED),
    Small("qwen2.5", 1, 32768, 8, f"{_QLORA} memory=lean"),
    Small("qwen2.5", 8, 2048, 8, _FULL),
    Small("qwen2.5", 2, 2048, 8, _FULL),
    Small("qwen2.5", 2, 2048, 8, f"{_FULL} precision=fp16"),
    Small("qwen2.5-7b", 2, 4096, None, "method=lora engine=graph gradient_checkpointing=full grad_accum_steps=16"),
    Small("qwen2.5-7b", 2, 4096, 80, _LORA),
)


CARDS = (4, 6, 8, 12, 16, 24)
_LAYERS = f"{_TILED} engine.host_layers=all"
_LONGEST_BY = ("engine=liger gradient_checkpointing=full", "engine=graph memory=lean", _TILED, _LAYERS)
_SAID = (
    *((model, way) for model in ("llama3.1", "qwen2.5") for way in _LONGEST_BY),
    *((model, _LAYERS) for model in ("llama2-13b", "llama3.1-70b")),
)


def said(out: Path) -> None:
    """Write out/small_cards_said.json: of each model, way and card the longest rows that fit for certain and that may
    fit, with the stated default for context and libraries."""
    os.environ["XDG_CACHE_HOME"] = str(out / "nowhere")
    with ProcessPoolExecutor() as pool:
        rows = list(pool.map(_lengths, _SAID))
    write_json(out / "small_cards_said.json", {"cards": CARDS, "rows": rows})


def _lengths(asked: tuple[str, str]) -> dict[str, Any]:
    model, way = asked
    config = compose([*_SHAPES[model], *COMMON, *_RANK_32.split(), "batch_size=1", *way.split()])
    search = Search(config, shapes_of(config.model))
    ends = [[search.largest("seq_len", card * GIB, certain=sure) for sure in (True, False)] for card in CARDS]
    return {"model": model, "settings": way, "lengths": ends}


def said_table() -> str:
    """Return docs/small_cards.md's table of the longest rows."""
    content = stored("small_cards_said")
    lines = [
        [_TITLES[row["model"]], f"`{row['settings']}`", *(_between(*ends) for ends in row["lengths"])]
        for row in content["rows"]
    ]
    return markdown(["model", "settings", *(f"{card} GiB" for card in content["cards"])], lines)


def _between(certain: int, possible: int) -> str:
    if not possible:
        return "-"
    return f"{certain:,} to {possible:,}" if possible > certain else f"{certain:,}"


def main() -> None:
    if sys.argv[1:2] == ["said"]:
        said(Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--have", type=Path, nargs="*", default=[])
    parser.add_argument("--only", default="", help="a regular expression: trials whose names have a match")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    trials: dict[str, Any] = earlier(asked.have)
    run = Run(asked.out / "small_cards.json", "auto", asked.seconds, trials)
    run.go((case_of(case) for case in CASES if re.search(asked.only, case.name)), at_once=1)


def case_of(case: Small) -> Case:
    """Return a trial with its capacity, and what lora_lab.fit says of it now."""
    steps = 1 if case.length > _LONGEST else 2 if "accum" in case.settings or case.length > _SHORT else 10
    sizes = [f"batch_size={case.rows}", f"seq_len={case.length}", f"measure.steps={steps}"]
    config = compose([*_SHAPES[case.model], *COMMON, "data.rows=256", *sizes, *case.settings.split()])
    limit = None if case.card is None else float(case.card)
    return Case(case.name, replace(config, vram_limit_gib=limit), estimate(config, shapes_of(config.model)))


def table() -> str:
    """Return docs/small_cards.md's table, from the stored trials."""
    content = stored("h200/small_cards")
    lines = []
    for case in CASES:
        trial = content["trials"].get(case.name)
        if trial is None:
            continue
        phases = trial["phases"]
        live, reserved = (
            max((phases[each][place] or 0 for each in _TRAINING if each in phases), default=0) for place in (0, 1)
        )
        speed = trial.get("tokens_per_second")
        lines.append(
            [
                _TITLES[case.model],
                f"{case.rows} x {case.length:,}",
                "all of it" if case.card is None else f"{case.card} GiB",
                f"`{case.settings}`",
                trial["outcome"].replace("_", " "),
                f"{live / GIB:.2f} / {reserved / GIB:.2f}" if live else "-",
                f"{trial['said']['allocated'] / GIB:.2f} / {trial['said']['reserved'] / GIB:.2f}",
                f"{speed:,.0f}" if speed else "-",
            ]
        )
    head = ["model", "batch", "card", "settings", "outcome", "live / reserved GiB", "as said before", "tokens/s"]
    commits = ", ".join(sorted({trial["commit"][:7] for trial in content["trials"].values()}))
    return f"{markdown(head, lines)}\n\nCapacities emulated on an {content['origin']['device']}, commits {commits}."


_TRAINING = ("first_step", "warm_up", "window")


if __name__ == "__main__":
    main()
