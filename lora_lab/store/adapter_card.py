"""The model card of what a trial has trained: README.md, as the Hugging Face hub reads it.

The card describes the adapter or the model and reveals nothing about the machine."""

import contextlib
import shlex
from pathlib import Path

import yaml

from lora_lab.base_weights import WEIGHTS, BaseWeights
from lora_lab.files import write_text
from lora_lab.options import Init, MethodKind
from lora_lab.reading import Damaged, whole
from lora_lab.secrets import without_secrets
from lora_lab.store.record import Record

_SETTINGS = (
    "method",
    "method.rank",
    "method.alpha",
    "method.init",
    "method.freeze_a",
    "method.dropout",
    "method.target_modules",
    "method.quantization",
    "optimizer",
    "optimizer.weight_decay",
    "precision",
    "learning_rate",
    "batch_size",
    "grad_accum_steps",
    "seq_len",
    "measure.warmup_steps",
    "measure.steps",
    "seed",
)
_LOFTQ = (
    "- Load the base model in 4 bit by bitsandbytes, with the quantisation below: the adapter makes up for what is "
    "lost by that."
)
_VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "lora_lab")


def write_card(trained: Path, record: Record) -> None:
    """Write the card into the folder of what was trained, over PEFT's template.

    Raises: OSError."""
    weights = None
    with contextlib.suppress(Damaged):  # then the card says nothing of them
        weights = whole(BaseWeights, trained.parent / WEIGHTS)
    write_text(trained / "README.md", without_secrets(card(record, weights)))


def card(record: Record, weights: BaseWeights | None = None) -> str:
    """Return the card's text."""
    base, data = _base_model(record), record.params.get("data", "not recorded")
    is_whole = record.params.get("method.kind") == MethodKind.full.name
    is_vera = record.params.get("method.kind") == MethodKind.vera.name
    head = {
        **({"base_model": base} if base else {}),
        "library_name": "transformers" if is_whole else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora_lab"] if is_whole else ["vera" if is_vera else "lora", "lora_lab"],
    }
    what = "All weights of" if is_whole else f"A {'VeRA' if is_vera else 'LoRA'} adapter for"
    named = [key for key in _SETTINGS if key in record.params and not (is_whole and key.startswith("method."))]
    settings = [f"| {key} | {record.params[key]} |" for key in named]
    versions = [f"{name} {record.tags[f'version.{name}']}" for name in _VERSIONS if f"version.{name}" in record.tags]
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        f"# {_heading(record)}",
        "",
        f"{what} {base or _unnamed_base(record)}, trained and measured by lora_lab.",
        "",
        *([] if weights is None else [f"- Trained on: {weights.named()}"]),
        *([_LOFTQ] if record.params.get("method.init") == Init.loftq.name else []),
        f"- Data: {_data(record, data)}",
        f"- Held-out loss: {_loss(record)}",
        f"- Outcome: {record.outcome}",
        f"- Versions: {', '.join(versions) or 'not recorded'}",
        "",
        "| setting | value |",
        "|---|---|",
        *settings,
        "",
        "```",
        _command(record.tags.get("command", "")),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _base_model(record: Record) -> str | None:
    """Return the model's name on the hub. Return None for a local folder, whose name is private."""
    named = record.params.get("model.source") in ("hub", "package") and record.params.get("model.weights") != "random"
    name = record.params.get("model.id", "None")
    return name if named and name != "None" else None


def _unnamed_base(record: Record) -> str:
    if record.params.get("model.weights") == "random":
        return f"random weights in the shape of {record.params.get('model', 'a model')}: good only for measuring"
    return "a local model"


def _data(record: Record, name: str) -> str:
    known = record.params.get("data.id", "None")
    digest = record.tags.get("data_digest")
    return (name if known == "None" else known) + (f", sha256 of its rows {digest}" if digest else "")


def _loss(record: Record) -> str:
    before, after = (record.metrics.get(key) for key in ("loss/eval_before", "loss/eval"))
    if before is None or after is None:
        return "not evaluated"
    return f"{before:.4f} before training, {after:.4f} after (nats per token)"


_PATHS = ("data.path", "model.path")


def _heading(record: Record) -> str:
    """Return the trial's name. A path in it keeps its last name."""
    name = record.name
    for path in filter(None, (record.params.get(key) for key in _PATHS)):
        name = name.replace(path, Path(path).name)
    return name


def _command(command: str) -> str:
    """Return the command without folders. A path keeps its last name. Settings of stores and output folders are
    dropped."""
    try:
        words = shlex.split(command)
    except ValueError:  # an older version did not quote it
        return ""
    kept = []
    for word in words:
        key, equals, value = word.partition("=")
        if key.lstrip("+").startswith(("hydra.", "tracking.", "--config-dir")):
            continue
        plain = value.strip("'\"[]")
        is_path = bool(equals) and (key.lstrip("+") in _PATHS or plain.startswith(("/", "~", ".")) or "/" in plain)
        is_path = is_path and key not in ("model.id", "data.id")
        kept.append(f"{key}={shlex.quote(Path(plain).name)}" if is_path else shlex.quote(word))
    return " ".join(kept)
