"""Write a trained model as a GGUF file, and compare what is read from it with the merged model."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.gguf_converter import TYPES, convert, convert_vocabulary
from lora_lab.options import Weights

if TYPE_CHECKING:
    from lora_lab.worker.merging import GgufCheck, Merger, Written


def gguf_file(named: str | None, name: str, config: TrialConfig) -> Path:
    """Return the file to write: the one that is named, or one in this folder that is named after model and type.

    Raises: InvalidInput when it exists, when it cannot be made, or when the model cannot be a GGUF file."""
    if config.model.weights is Weights.random:
        raise InvalidInput(
            "this trial's model has random weights and a tokenizer of single bytes, which llama.cpp does not know. "
            "Name a trial of a model with weights of its own."
        )
    model = Path(config.model.id or config.model.path or "model").name
    out = Path(named or f"{model}-tuned-{name}.gguf").absolute()
    if out.suffix != ".gguf":
        raise InvalidInput(f"{named} does not end in .gguf, by which other programs know the file: --out {named}.gguf")
    if out.exists():
        raise InvalidInput(f"{out} exists. Name a new file: --out FILE.gguf")
    if not os.access(out.parent, os.W_OK):
        raise InvalidInput(f"{out} cannot be made: {out.parent} is not a folder that can be written to.")
    return out


def export_gguf(merger: "Merger", name: str, out: Path, say: Callable[[str], None]) -> tuple["Written", "GgufCheck"]:
    """Merge, convert, and read the file again. Nothing else is left behind.

    Args:
        say: gets a line at the start of each part.

    Raises: InvalidInput when llama.cpp does not know the model or its tokenizer, which is found before anything is
        merged."""
    kind = TYPES[name]
    between = 2 if kind.ftype else 0
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as place:
        shapes, merged, made = (Path(place) / each for each in ("shapes", "merged", out.name))
        say("trying llama.cpp's converter on config and tokenizer")
        merger.write_shapes(shapes)
        merger.check_vocabulary(convert_vocabulary(shapes))
        written = merger.merge(merged, more=kind.bits / 8 + between)
        say(f"converting to {name}")
        convert(merged, made, name)
        os.rename(made, out)
    return written, merger.gguf(out)
