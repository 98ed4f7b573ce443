"""README's table by card size: what fits the card you own, from the records that come with lora_lab."""

from collections.abc import Iterator, Sequence

from benchmarks.reports import markdown, origin
from lora_lab.config import InvalidInput
from lora_lab.report.answers.best.another_card import RESERVE, choose_for_another_card, largest_first
from lora_lab.report.answers.best.candidates import Candidate, Wish
from lora_lab.report.measures import THROUGHPUT, VRAM
from lora_lab.store.packed_runs import SHIPPED, PackedRuns
from lora_lab.store.stored_runs import StoredRuns
from lora_lab.store.trials import Trial

CARDS_GIB = (6, 8, 12, 16, 24)
HEAD = [
    "card",
    "model",
    "method",
    "batch x length",
    "checkpointing",
    "engine",
    "GiB on the card",
    "tokens/s on an H100",
]


def cards() -> str:
    """Return the table: for each card, model and method the fastest configuration that fits, as `best` chooses it."""
    trials, _ = StoredRuns(PackedRuns(SHIPPED)).runs()
    chosen = [(gib, best) for gib in CARDS_GIB for best in _best(trials, gib)]
    rows = [_row(gib, best) for gib, best in chosen]
    how = f"One trial each, random weights, rows of full length. {100 * RESERVE:g} % of each card is left free."
    failed = " ".join(_too_much(trial) for trial in trials if trial.outcome == "out_of_memory")
    said = f"{origin(trials)} {how} {failed}".rstrip()
    return f"{markdown(HEAD, rows)}\n\n{said}{_footnote([best for _, best in chosen])}"


def _unknown(best: Candidate) -> list[str]:
    """Return why the validity of its figures is not known; empty where it is."""
    return [trial.tags["validity_reasons"] for trial in best.trials if trial.tags["validity"] == "unknown"]


def _footnote(chosen: Sequence[Candidate]) -> str:
    """Return what the asterisk of a row means; "" where none has one."""
    why = "; ".join(dict.fromkeys(reason for best in chosen for reason in _unknown(best)))
    return f"\n\n\\* Not known to be valid: {why}." if why else ""


def _best(trials: Sequence[Trial], gib: int) -> Iterator[Candidate]:
    """Yield what to use for each model and method that fits, the largest model last."""
    for model in reversed(largest_first(trials)):
        for method in ("qlora", "lora"):
            some = [trial for trial in trials if (trial.params["model"], trial.params["method"]) == (model, method)]
            try:
                best = choose_for_another_card(some, Wish(objective=THROUGHPUT, vram_gib=gib, model=model)).best
            except InvalidInput:  # none of them was measured
                continue
            if best is not None:
                yield best


def _too_much(trial: Trial) -> str:
    params = trial.params
    setting = f"{params['method']}, {params['batch_size']}x{params['seq_len']}, rank {params['method.rank']}"
    limit = float(params["vram_limit_gib"])
    return f"{_name(trial)} ({setting}) ran out of memory within {limit:g} GiB."


def _name(trial: Trial) -> str:
    return trial.params["model.id"].rpartition("/")[2].removesuffix("-Instruct")


def _row(gib: int, best: Candidate) -> list[str]:
    params = best.trials[0].params
    return [
        f"{gib} GB",
        _name(best.trials[0]),
        params["method"],
        f"{params['batch_size']}x{params['seq_len']}",
        params["gradient_checkpointing"],
        params["engine"],
        f"{best.figures[VRAM.name].high:.1f}",
        f"{best.figures[THROUGHPUT.name].median:,.0f}{' *' if _unknown(best) else ''}",
    ]
