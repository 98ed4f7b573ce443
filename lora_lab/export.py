"""Write a trained model for use without lora_lab: python -m lora_lab.export RUN --merge OUT

The adapter is merged into the base model, never into 4-bit weights. The held-out loss of what was written is compared
with the adapter's. Exit code 0 when they agree within the stated bound, 1 when they do not (the folder stays), 2 when
nothing could be written."""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lora_lab.composition.compose import stored_config
from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.options import DType, Quantization
from lora_lab.outcome import EXIT_INTERRUPTED, EXIT_REFUSED
from lora_lab.output import never_end_for_output
from lora_lab.store.errors import TrackingFailed
from lora_lab.store.trained import ADAPTER, CONFIG, RUN_HELP, find_trained
from lora_lab.trial.in_process import prepare_process

if TYPE_CHECKING:
    from lora_lab.worker.merging import Losses

EXIT_DIFFERS = 1


_BOUND_FP32 = 1e-4
"""In nats per token. Merging in fp32 differs by rounding alone: below 1e-5 with the tiny model."""
_BOUND_16_BIT = 0.01
"""Each merged weight is rounded to 16 bit. With SmolLM2-135M that changed the loss by 0.0003."""
_BOUND_QLORA = 0.4
"""The adapter was trained on weights in 4 bit, and is merged into whole ones, so the loss of quantisation goes. With
SmolLM2-135M that changed the loss by 0.21; small models lose most in 4 bit. So this finds broken files, but not an
adapter that is missing: its gain may be less."""


def bound_of(config: TrialConfig) -> float:
    """Return how far the merged model's held-out loss may be from the adapter's, in nats per token."""
    if config.method.quantization is not Quantization.none:
        return _BOUND_QLORA
    return _BOUND_FP32 if config.precision.dtype is DType.fp32 else _BOUND_16_BIT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    never_end_for_output()
    asked = _parser().parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as place:
            folder = find_trained(asked.run, Path(place)).folder
            config = stored_config(folder / CONFIG)
            out = _checked_out(asked.merge)
            losses = _merge(config, folder / ADAPTER, out)
    except (InvalidInput, TrackingFailed) as refusal:
        print(refusal, file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    _show(losses, config, out)
    difference, bound = abs(losses.merged - losses.adapter), bound_of(config)
    if not difference <= bound:  # also where one is not a number
        print(
            f"The merged model differs from the adapter by {difference:.3g} nats per token, and {bound:g} is the most "
            f"that is expected. It was left in {out}: look at its answers before you use it.",
            file=sys.stderr,
        )
        return EXIT_DIFFERS
    return 0


def _merge(config: TrialConfig, adapter: Path, out: Path) -> "Losses":
    prepare_process(config)
    from lora_lab.worker.merging import Merger  # it imports torch

    return Merger(config, adapter, lambda line: print(f"{line} ...", file=sys.stderr)).merge(out)


def _checked_out(name: str) -> Path:
    """Return the folder to write.

    Raises: InvalidInput when something is there already, or nothing can be made there."""
    out = Path(name).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidInput(f"{name} exists and is not an empty folder. Name a new one: --merge OUT.")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise InvalidInput(f"{name} cannot be made: {out.parent} is not a folder that can be written to.")
    return out


def _show(losses: "Losses", config: TrialConfig, out: Path) -> None:
    table = Table(
        title=f"held-out loss, nats per token ({losses.rows} rows, {losses.tokens:,} tokens)", title_justify="left"
    )
    table.add_column("model")
    table.add_column("loss", justify="right")
    table.add_column("difference", justify="right")
    table.add_row("adapter on the base model as trained", f"{losses.adapter:.5f}", "")
    named = [(f"merged, in {config.precision.dtype.name}", losses.merged)]
    if losses.requantised is not None:
        named.append(("merged, loaded in 4 bit again", losses.requantised))
    for name, loss in named:
        table.add_row(name, f"{loss:.5f}", f"{loss - losses.adapter:+.5f}")
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(f"written to {out}", highlight=False, markup=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lora_lab.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--merge",
        metavar="OUT",
        required=True,
        help="write a folder with the whole model, its tokenizer and its chat template, which from_pretrained loads",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
