"""The numbers in README.md and docs/*.md, each made from stored records: python -m benchmarks.numbers

Between `<!-- begin NAME -->` and `<!-- end NAME -->` is what the function of that name returns. To add one, write it
into MADE. The command makes every block again. tests/test_benchmarks.py fails where a page has another text."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks import coverage, queued_trials, stopping
from benchmarks.auto_table import gpu_bound, host_bound
from benchmarks.cards import cards
from benchmarks.checks_table import flop_check, looking, matmul_rate, overhead, paged
from benchmarks.cotrain import table as cotrain
from benchmarks.data_parallel import table as data_parallel
from benchmarks.eight_gib_table import eight_gib
from benchmarks.engines_table import ladder, losses, optimizers
from benchmarks.fit_context import table as fit_context
from benchmarks.fit_error import held_out_table as fit_held_out
from benchmarks.fit_error import table as fit_error
from benchmarks.fit_error import trials_table as fit_trials
from benchmarks.fit_others import table as fit_others
from benchmarks.forecast_jobs import table as forecast_jobs
from benchmarks.forecast_table import forecast_errors
from benchmarks.full_training import loss_table as full_training_loss
from benchmarks.full_training import table as full_training
from benchmarks.jobs_table import killed, lab_chat, maths, quality
from benchmarks.lean_losses import table as lean_losses
from benchmarks.lean_losses import text_table as lean_text
from benchmarks.mask_check import table as mask_check
from benchmarks.memory_owners import table as memory_owners
from benchmarks.method_claims import table as method_claims
from benchmarks.methods_table import table as methods
from benchmarks.one_factor_table import one_factor
from benchmarks.outside_torch import table as outside_torch
from benchmarks.paper_table import covered, energy_agreement, paper, shape
from benchmarks.peers import longest
from benchmarks.peers import stored as peers
from benchmarks.raise_table import raising
from benchmarks.sharded import table as sharded
from benchmarks.side_by_side import table as side_by_side
from benchmarks.small_cards import said_table as small_cards_said
from benchmarks.small_cards import table as small_cards
from benchmarks.square_table import square_wave
from benchmarks.steady_table import steady
from benchmarks.trial_example import by_hand, recomputed
from benchmarks.trusted_table import trusted

ROOT = Path(__file__).parents[1]
MADE: dict[str, Callable[[], str]] = {
    "cards": cards,
    "paper": paper,
    "shape": shape,
    "covered": covered,
    "energy-agreement": energy_agreement,
    "one-factor": one_factor,
    "eight-gib": eight_gib,
    "trusted": trusted,
    "by-hand": by_hand,
    "recomputed": recomputed,
    "steady": steady,
    "matmul-rate": matmul_rate,
    "flop-check": flop_check,
    "paged": paged,
    "looking": looking,
    "overhead": overhead,
    "raising": raising,
    "engines-ladder": ladder,
    "engines-optimizers": optimizers,
    "engines-losses": losses,
    **{name: partial(coverage.quoted, name) for name in coverage.MADE},
    "stopping": stopping.quoted,
    "auto-gpu-bound": gpu_bound,
    "auto-host-bound": host_bound,
    "square-wave": square_wave,
    "forecast-errors": forecast_errors,
    "maths": maths,
    "lab-chat": lab_chat,
    "quality": quality,
    "killed-jobs": killed,
    "mask-check": mask_check,
    "fit-error": fit_error,
    "fit-held-out": fit_held_out,
    "fit-trials": fit_trials,
    "fit-context": fit_context,
    "fit-others": fit_others,
    "forecast-jobs": forecast_jobs,
    "small-cards": small_cards,
    "small-cards-said": small_cards_said,
    "lean-losses": lean_losses,
    "lean-text": lean_text,
    "memory-owners": memory_owners,
    "data-parallel": data_parallel,
    "sharded": sharded,
    "side-by-side": side_by_side,
    "full-training": full_training,
    "full-training-loss": full_training_loss,
    "cotrain": cotrain,
    "method-claims": method_claims,
    "methods": methods,
    "longest": longest.quoted,
    "queued-trials": queued_trials.quoted,
    "outside-torch": outside_torch,
    "peers-8b-lean": partial(peers.page, "h200/peers_qlora_llama3_1_8b_lean"),
    "peers-summary": peers.summary,
    "peers-1_5b": partial(peers.page, "h200/peers_qlora_qwen2_5_1_5b"),
    "peers-8b": partial(peers.page, "h200/peers_qlora_llama3_1_8b"),
    "peers-before": partial(peers.page, "h100/peers_qlora"),
}
_BLOCK = re.compile(r"<!-- begin (?P<name>[\w-]+) -->\n(?P<text>.*?)<!-- end (?P=name) -->", re.DOTALL)
_MARK = re.compile(r"<!-- (?:begin|end) [\w-]+ -->")


def main() -> None:
    for page in pages():
        text = page.read_text(encoding="utf-8")
        made = remade(text)
        if made != text:
            page.write_text(made, encoding="utf-8")
            print(f"made again: {page.relative_to(ROOT)}")


def pages() -> Iterator[Path]:
    """Yield the pages that may have numbers."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").glob("*.md"))


def outside(text: str) -> str:
    """Return a page without its blocks."""
    return _BLOCK.sub("", text)


def remade(text: str) -> str:
    """Return a page with every block made from the stored records.

    Raises: ValueError when a mark has no partner, or a block's name is not in MADE."""

    def block(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in MADE:
            raise ValueError(f"no function makes the block {name}. There are: {', '.join(MADE)}.")
        return f"<!-- begin {name} -->\n\n{MADE[name]().strip()}\n\n<!-- end {name} -->"

    if lone := _MARK.findall(outside(text)):
        raise ValueError(f"{lone[0]} has no partner. A block is <!-- begin NAME -->, its text, <!-- end NAME -->.")
    return _BLOCK.sub(block, text)


if __name__ == "__main__":
    main()
