"""Show an estimate, what to change, and the largest batch and row length of each way to train."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from lora_lab.composition.validation import faults
from lora_lab.config import TrialConfig
from lora_lab.fit.advice import advise
from lora_lab.fit.check import model_fault
from lora_lab.fit.estimate import FITS, GIB, Estimate
from lora_lab.fit.search import Search
from lora_lab.fit.shapes import Shapes
from lora_lab.method_config import MethodConfig
from lora_lab.options import Checkpointing, DType, EngineKind, MethodKind, Quantization

_NAMES = {
    "weights": "the model's weights as stored",
    "adapters": "adapters",
    "gradients": "gradients of what is trained",
    "optimizer": "optimizer state",
    "activations": "saved activations",
    "loss": "logits and their gradient",
    "working": "working copies and buffers",
}


def show_estimate(found: Estimate, console: Console) -> None:
    """Print where the memory goes at the moment at which most is held."""
    table = Table(title="GiB at the peak of a step", title_justify="left")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for part, size in found.parts.items():
        table.add_row(_NAMES[part], _gib(size))
    table.add_section()
    table.add_row("live tensors (vram/peak_allocated_gib)", _gib(found.allocated))
    if found.loading > found.allocated:
        table.add_row("live tensors while the model is loaded (vram/load_allocated_gib)", _gib(found.loading))
    table.add_row("with what the allocator keeps (vram/peak_reserved_gib)", _gib(found.reserved))
    table.add_row("the least that the allocator gets through with", _gib(found.least))
    if found.first:
        table.add_row("while the first step compiles, up to", _gib(found.first))
    if found.optimizer.paged:
        table.add_row("paged state, outside torch (vram/optimizer_paged_gib)", _gib(found.optimizer.paged))
    origin = "measured here" if found.libraries.device else "a stated default"
    table.add_row(f"CUDA context and libraries (vram/other_gib), {origin}", _gib(found.libraries.size))
    table.add_section()
    table.add_row("on the card (vram/peak_process_gib)", _gib(found.card))
    table.add_row("at most, on a card with plenty", _gib(found.high))
    table.add_row("a card must have", f"{_gib(found.low)} to {_gib(found.enough)}", style="bold")
    console.print(table)
    for reason in found.errors.reasons:
        console.print(f"The interval is wider because of {reason}.", highlight=False, markup=False)


def show_verdicts(
    found: Estimate, config: TrialConfig, shapes: Shapes, cards: Sequence[float], console: Console
) -> bool:
    """Print for each card whether the trial fits, and what to change where that is not certain. Return whether it fits
    the first.

    Args:
        cards: sizes in GiB.
    """
    for card in cards:
        verdict = found.verdict(card * GIB)
        console.print(f"{card:g} GiB: {verdict}.", highlight=False, style="bold")
        if verdict == FITS:
            continue
        changes = advise(config, shapes, card * GIB)
        if not changes:
            console.print("  No change known here makes that certain. Choose a smaller model.", highlight=False)
        for change in changes:
            console.print(f"  {change.override}    ({change.cost})", highlight=False, markup=False, soft_wrap=True)
    return found.verdict(cards[0] * GIB) == FITS


def show_limits(config: TrialConfig, shapes: Shapes, cards: Sequence[float], console: Console) -> None:
    """Print the largest row length and batch for each method, engine and checkpointing, on each card."""
    searches = [(way, Search(way, shapes)) for way in ways(config) if not model_fault(way, shapes)]
    for card in cards:
        title = f"{card:g} GiB: fits for certain; in brackets, may fit"
        table = Table(title=title, title_justify="left")
        for name in ("method", "engine", "checkpointing"):
            table.add_column(name)
        table.add_column(f"longest rows at batch_size={config.batch_size}", justify="right")
        table.add_column(f"rows of {config.seq_len} tokens", justify="right")
        for way, search in searches:
            cells = [_limit(search, setting, card * GIB) for setting in ("seq_len", "batch_size")]
            table.add_row(_method(way.method), way.engine.kind.name, way.gradient_checkpointing.name, *cells)
        console.print(table)


def show_context(config: TrialConfig, shapes: Shapes, cards: Sequence[float], console: Console) -> None:
    """Print the longest rows that fit each card, for each engine and checkpointing of the trial's own method."""
    title = f"longest rows at batch_size={config.batch_size}: fits for certain; in brackets, may fit"
    table = Table(title=title, title_justify="left")
    for name in ("engine", "checkpointing"):
        table.add_column(name)
    for card in cards:
        table.add_column(f"{card:g} GiB", justify="right")
    own = _method(config.method)
    same = [way for way in ways(config) if _method(way.method) == own and not model_fault(way, shapes)]
    for number, way in enumerate(same, start=1):
        with console.status(f"{number} of {len(same)}"):
            search = Search(way, shapes)
            cells = [_limit(search, "seq_len", card * GIB) for card in cards]
        table.add_row(way.engine.kind.name, way.gradient_checkpointing.name, *cells)
    console.print(table)
    shown = {way.engine.kind for way in same}
    left_out = [kind.name for kind in EngineKind if kind not in shown]
    if left_out:
        console.print(f"Not with these settings: engine={', '.join(left_out)}. Typed, it says why.", highlight=False)


def ways(config: TrialConfig) -> list[TrialConfig]:
    """Return the trial under each method, engine and checkpointing, without those that are refused."""
    lora = replace(config.method, kind=MethodKind.lora, held_in=DType.fp32, quantization=Quantization.none)
    lora.double_quantization = False
    methods = [lora, replace(lora, quantization=Quantization.nf4, double_quantization=True)]
    if config.method.kind is MethodKind.full:
        methods.insert(0, config.method)
    modes = (Checkpointing.none, Checkpointing.full, Checkpointing.offloaded)
    own = config.engine
    engines = [
        own if own.kind is kind else replace(own, kind=kind, chunked_loss=kind is not EngineKind.eager)
        for kind in EngineKind
    ]
    ways = [
        replace(config, method=method, engine=engine, gradient_checkpointing=mode)
        for method, engine, mode in itertools.product(methods, engines, modes)
    ]
    return [way for way in ways if not faults(way)]


def _method(method: MethodConfig) -> str:
    """Return a name for the kind of method."""
    if method.kind is MethodKind.full:
        return "full"
    return "lora" if method.quantization is Quantization.none else "qlora"


def _limit(search: Search, setting: str, capacity: float) -> str:
    certain = search.largest(setting, capacity, certain=True)
    possible = search.largest(setting, capacity, certain=False)
    if not possible:
        return "-"
    return f"{certain:,} ({possible:,})" if possible > certain else f"{certain:,}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
