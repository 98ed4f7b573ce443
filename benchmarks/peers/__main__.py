"""Time fine-tuning stacks against each other on one GPU, in turns within one session.

    python -m benchmarks.peers OUT [--cells 1x512,2x2048c,8x2048cp] [--contenders plain,unsloth,graph] [--model MODEL]
    python -m benchmarks.peers join OUT FILE.json ...   the cells of several calls as one file
    python -m benchmarks.peers table FILE.json          a file's page, made again

OUT/peers_METHOD_MODEL.json has every turn, the .md of that name the tables. A cell is written as soon as it is done;
cells of several calls into one folder come together in one file. All contenders have the same random weights, adapters,
rows and Trainer settings: docs/peers.md.
"""

import argparse
import shlex
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.peers import stored
from benchmarks.peers.controller import Race, Settings, make_material
from benchmarks.peers.plan import CELLS, DEFAULT_CONTENDERS, NEEDS, Cell
from benchmarks.reports import provenance
from lora_lab.store.environment import device_facts, environment
from lora_lab.trial.devices import choose_placement, worker_environment


def main(arguments: list[str]) -> None:
    match arguments:
        case ["table", path]:
            print(stored.write_page(Path(path)))
        case ["join", out, *paths] if paths:
            content = stored.joined([stored.read(Path(path)) for path in paths])
            print(stored.write(stored.file_of(Path(out), content), content))
        case _:
            _run(arguments)


def _run(arguments: list[str]) -> None:
    begun = time.monotonic()
    asked = _parse(arguments)
    placement = choose_placement(asked.device)
    shown = worker_environment(placement)
    origin = provenance(environment() | device_facts(placement), _command(arguments, asked))
    if asked.note:
        origin["note"] = asked.note
    settings = Settings(
        contenders=asked.contenders,
        method=asked.method,
        model=asked.model,
        rounds=asked.rounds,
        least=asked.steps,
        warmup=asked.warmup,
        window_seconds=asked.window_seconds,
        load_timeout=asked.load_timeout,
        turn_timeout=asked.turn_timeout,
        deadline=begun + asked.budget_seconds,
    )
    content = stored.empty(settings.method, settings.model)
    path = stored.file_of(asked.out, content)
    content = stored.read(path) if path.is_file() else content
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        scratch = Path(folder)
        material = (asked.material or scratch).resolve() / f"material_{asked.model}"
        longest = 0.0
        for cell in asked.cells:
            if asked.resume and str(cell) in content["cells"]:
                continue
            if time.monotonic() + longest > settings.deadline:
                _say(f"{cell} is left out: it would not end within {asked.budget_seconds:g} s")
                continue
            make_material(material, asked.model, scratch, shown)
            _say(f"{cell} begins after {time.monotonic() - begun:.0f} s")
            start = time.monotonic()
            content["cells"][str(cell)] = Race(cell, settings, material, scratch, shown, _say).run()
            content["origins"][str(cell)] = origin
            stored.write(path, content)
            longest = max(longest, time.monotonic() - start)
    _say(f"done after {time.monotonic() - begun:.0f} s")
    if content["cells"]:
        print(stored.write(path, content))


def _say(line: str) -> None:
    print(line, flush=True)


def _command(arguments: list[str], asked: argparse.Namespace) -> str:
    """Return the command line as typed, but for folders of that machine."""
    folders = {str(asked.out): "OUT", str(asked.material): "MATERIAL"}
    return "python -m benchmarks.peers " + shlex.join(folders.get(word, word) for word in arguments)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--cells", type=_cells, default=_cells(",".join(CELLS)))
    parser.add_argument("--contenders", type=_contenders, default=list(DEFAULT_CONTENDERS))
    parser.add_argument("--method", choices=("qlora", "lora"), default="qlora")
    parser.add_argument("--model", default="qwen2_5_1_5b", help="a file of conf/model with an architecture")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps in a window, at least")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--window-seconds", type=float, default=5, help="a window ends then, or after 30 steps and 2 s")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="no cell or round that ends later")
    parser.add_argument("--load-timeout", type=float, default=300, help="seconds")
    parser.add_argument("--turn-timeout", type=float, default=180, help="seconds; the first turn has twice that")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--material", type=Path, help="folder that keeps the shared weights from call to call")
    parser.add_argument("--note", default="", help="what else a reader should know of this run")
    parser.add_argument("--resume", action="store_true", help="leave out cells that the file has")
    asked = parser.parse_args(arguments)
    if min(asked.rounds, asked.steps, asked.warmup) < 1:
        parser.error("rounds, steps and warmup are 1 at least")
    return asked


def _cells(text: str) -> list[Cell]:
    try:
        return [Cell.parse(part) for part in text.split(",")]
    except ValueError as error:  # argparse would leave its words out
        raise argparse.ArgumentTypeError(str(error)) from None


def _contenders(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in NEEDS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no contender {', '.join(unknown)}; there are {', '.join(NEEDS)}")
    return names


if __name__ == "__main__":
    main(sys.argv[1:])
