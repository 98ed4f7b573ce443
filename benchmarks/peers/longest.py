"""Find the longest row that Unsloth trains within emulated small cards: 8B shapes, QLoRA of rank 32, 8-bit AdamW.

    python -m benchmarks.peers.longest OUT [--contenders unsloth,unsloth_lean] [--cards 8,12] [--attempts 6]

Each attempt is a process of its own, alone on the card. lora_lab's rows for the same cards are those of
`python -m benchmarks.small_cards`. A capacity is emulated as there: torch's allocator is capped. Besides, the process
sees as much free memory as the small card would have, since Unsloth sizes its pieces by it. Every attempt is one short
step, after which the optimizer's state is there, and one step of the length. The search begins at lora_lab's length
and at the one that Unsloth publishes, and ends when it knows the longest row within a twentieth.

Writes OUT/longest.json after every attempt; a later call into OUT adds to it. No attempt begins that would probably end
after --seconds.
"""

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.contender import answered
from benchmarks.peers.controller import make_material
from benchmarks.peers.plan import UNSLOTH, Cell, Setup, Turn
from benchmarks.peers.processes import environment as environment_of
from benchmarks.reports import markdown, provenance, stored
from lora_lab.files import read_json, write_json
from lora_lab.outcome import Outcome
from lora_lab.store.environment import device_facts, environment
from lora_lab.trial.devices import choose_placement, worker_environment

MODEL = "llama3_1_8b"
RANK = 32
PUBLISHED = {8: 2_972, 12: 21_848, 16: 40_724, 24: 78_475}
"""Tokens by card in GiB, as Unsloth states them for this model, rank and batch 1."""
OURS = {8: 6_144, 12: 32_768, 16: 56_000, 24: 80_000}
"""The rows of benchmarks.small_cards."""
_LONGEST = 131_072
"""The most positions that the model has."""
_SHORT = 64
_CLOSE = 1.05
_GROWTH = 1.25
"""How much longer the next row is while none was too long."""
FINISHED = Outcome.finished.value


@dataclass
class Search:
    """Looks for the longest row on one card."""

    card: int
    most: int = 6
    """Attempts, at most."""
    fits: int = 0
    """The longest row that was trained; 0 before there is one."""
    too_long: int | None = None
    attempts: int = 0
    _first: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._first = [OURS[self.card], PUBLISHED[self.card]]

    def next(self) -> int | None:
        """Return the next row's length; None when the longest is known or enough was tried."""
        if self.attempts >= self.most:
            return None
        while self._first:
            length = self._first.pop(0)
            if length > self.fits and (self.too_long is None or length < self.too_long):
                return length
        if self.too_long is None:
            longer = min(_LONGEST, round(self.fits * _GROWTH))
            return longer if longer > self.fits else None
        if self.fits and self.too_long / self.fits <= _CLOSE:
            return None
        return round(math.sqrt(max(self.fits, _SHORT) * self.too_long))

    def note(self, length: int, finished: bool) -> None:
        """Take note of how an attempt ended."""
        self.attempts += 1
        if finished:
            self.fits = max(self.fits, length)
        else:
            self.too_long = min(self.too_long or length, length)


class SmallCard:
    """Lets this process see and use as much of the card as a smaller one has."""

    def __init__(self) -> None:
        import torch

        self._cuda: Any = torch.cuda
        self._real: Callable[..., tuple[int, int]] = torch.cuda.mem_get_info
        self._bytes = 0.0

    def shrink(self, gib: float) -> None:
        """Cap torch's allocator, and answer for the free memory from now on."""
        import torch

        from lora_lab.worker.vram_limit import VramLimit

        self._bytes = gib * 2**30
        self._cuda.mem_get_info = self._real
        VramLimit(gib, torch.device("cuda", 0)).apply()
        self._cuda.mem_get_info = self._shown

    def used_gib(self) -> float:
        """Return what is in use of the card, by anybody."""
        free, total = self._real(0)
        return (total - free) / 2**30

    def _shown(self, device: Any = None) -> tuple[int, int]:
        free, total = self._real(device)
        return max(0, int(self._bytes) - (total - free)), int(self._bytes)


def attempt(contender: str, material: str, card: int, length: int) -> dict[str, Any]:
    """Train on one row of `length` tokens within a card of `card` GiB, in this process; return what was measured."""
    small = SmallCard()
    begun = time.monotonic()
    found = answered(lambda: _train(contender, material, length, lambda: small.shrink(card)))
    kept = ("outcome", "reason", "traceback", "peak_reserved_gib", "tokens_per_second")
    tried = {"contender": contender, "card": card, "length": length, "seconds": time.monotonic() - begun}
    return tried | {key: found.get(key) for key in kept} | {"used_gib_after": small.used_gib()}


def _train(contender: str, material: str, length: int, shrink: Callable[[], None]) -> dict[str, Any]:
    import torch

    from benchmarks.peers.material import adapter_key
    from benchmarks.peers.stacks import build
    from benchmarks.peers.turn import run_turn
    from lora_lab.worker.data import IGNORED, Example

    # Unsloth makes buffers for rows of the length that it is loaded with
    setup = Setup(contender, Cell(1, length, checkpointing=True, packed=False), "qlora", material, RANK, "adamw_8bit")
    built = build(setup, "cuda")
    first = {
        str(adapter_key(name)): value.detach().cpu()
        for name, value in built.model.named_parameters()
        if value.requires_grad
    }
    generator, vocabulary = torch.Generator().manual_seed(0), int(built.model.config.get_text_config().vocab_size)

    def row(tokens: int) -> Example:
        ids = torch.randint(vocabulary, (tokens,), generator=generator).tolist()
        return Example(ids, [IGNORED, *ids[1:]])

    torch.cuda.empty_cache()
    shrink()
    turn = Turn(warmup=1, least=1, seconds=0.0, compared=1, profiled=0)
    return run_turn(built, turn, [row(_SHORT), row(length)], 1, first)


def _add(out: Path, attempt: dict[str, Any]) -> None:
    content = read_json(out / "longest.json")
    content["attempts"].append(attempt)
    write_json(out / "longest.json", content)


def longest(attempts: list[dict[str, Any]], contender: str, card: int) -> tuple[int, int | None]:
    """Return the longest row that was trained (0 for none), and the shortest that did not fit (None for none)."""
    own = [each for each in attempts if (each["contender"], each["card"]) == (contender, card)]
    fits = [each["length"] for each in own if each["outcome"] == FINISHED]
    too_long = [each["length"] for each in own if each["outcome"] == Outcome.out_of_memory.value]
    return max(fits, default=0), min(too_long, default=None)


def table(content: dict[str, Any], ours: dict[int, int]) -> str:
    """Return a row for each card.

    Args:
        ours: lora_lab's row of each card that was trained."""
    contenders = list(dict.fromkeys(each["contender"] for each in content["attempts"]))
    lines = []
    for card, published in PUBLISHED.items():
        found = [longest(content["attempts"], contender, card) for contender in contenders]
        lines.append([f"{card} GiB", f"{ours[card]:,}" if card in ours else "-", f"{published:,}", *map(_ends, found)])
    names = [f"`{name}`, measured" for name in contenders]
    return markdown(["card", "lora_lab, trained", "Unsloth, published", *names], lines)


def _ends(ends: tuple[int, int | None]) -> str:
    fits, too_long = ends
    found = [f"{fits:,} trained"] if fits else []
    found += [f"out of memory at {too_long:,}"] if too_long is not None else []
    return ", ".join(found) or "-"


def quoted() -> str:
    """Return docs/small_cards.md's table, from the stored trials."""
    trials = stored("h200/small_cards")["trials"]
    ours = {
        card: length
        for card, length in OURS.items()
        if any(
            name.startswith(f"llama3.1 1x{length} on {card}:") and each["outcome"] == FINISHED
            for name, each in trials.items()
        )
    }
    content = stored("h200/longest")
    origin = content["origin"]
    return f"{table(content, ours)}\n\nMeasured on an {origin['device']}, commit {origin['commit'][:7]}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--contenders", default=UNSLOTH)
    parser.add_argument("--cards", default=",".join(map(str, PUBLISHED)))
    parser.add_argument("--attempts", type=int, default=6, help="for each contender and card, at most")
    parser.add_argument("--seconds", type=float, default=330.0)
    parser.add_argument("--material", type=Path, help="folder that keeps the weights from call to call")
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    out = asked.out.resolve()
    if asked.length:
        _add(out, attempt(asked.contenders, str(asked.material), int(asked.cards), asked.length))
        return
    due = time.monotonic() + asked.seconds
    out.mkdir(parents=True, exist_ok=True)
    placement = choose_placement("auto")
    shown = worker_environment(placement)
    origin = provenance(environment() | device_facts(placement), "python -m benchmarks.peers.longest OUT")
    if not (out / "longest.json").exists():
        write_json(out / "longest.json", {"origin": origin, "attempts": []})
    with tempfile.TemporaryDirectory(prefix="longest-") as folder:
        scratch = Path(folder)
        material = (asked.material or scratch).resolve() / f"material_{MODEL}"
        make_material(material, MODEL, scratch, shown)
        for contender in asked.contenders.split(","):
            for card in map(int, asked.cards.split(",")):
                looking = Search(card, most=asked.attempts)
                took = 0.0
                while (length := looking.next()) is not None and time.monotonic() + 1.5 * took < due:
                    begun = time.monotonic()
                    command = [sys.executable, "-m", "benchmarks.peers.longest", str(out), "--material", str(material)]
                    command += ["--contenders", contender, "--cards", str(card), "--length", str(length)]
                    subprocess.run(command, env=environment_of(scratch, shown), cwd=scratch, check=True)
                    took = time.monotonic() - begun
                    tried = read_json(out / "longest.json")["attempts"][-1]
                    if tried["outcome"] not in (FINISHED, Outcome.out_of_memory.value):
                        raise SystemExit(f"{contender} with {length} tokens: {tried['reason']}\n{tried['traceback']}")
                    looking.note(length, tried["outcome"] == FINISHED)
                    figures = [tried["peak_reserved_gib"], tried["tokens_per_second"], f"{took:.0f} s"]
                    print("tried", contender, card, length, tried["outcome"], *figures, flush=True)


if __name__ == "__main__":
    main()
