"""Name the settings that exist: their dotted keys, the groups, and what is near a wrong key."""

import dataclasses
import difflib
import textwrap
from collections.abc import Mapping
from typing import Any

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.settings import settings_of

GROUPS = tuple(f.name for f in dataclasses.fields(TrialConfig) if dataclasses.is_dataclass(f.type))
"""The groups a user chooses from: optimizer, precision, method, ..."""


def chosen_options(choices: Mapping[str, Any]) -> dict[str, str]:
    """Return the option that was chosen of each group.

    Args:
        choices: Hydra's, which does not have a group that was taken out or given as a list.

    Raises: InvalidInput."""
    without = [group for group in GROUPS if not isinstance(choices.get(group), str)]
    if without:
        raise InvalidInput(
            *(f"{group} needs one option. Type {group}=NAME; lora-lab --help lists the names." for group in without)
        )
    return {group: choices[group] for group in GROUPS}


_LEFT, _WIDTH = 28, 120

_ELSEWHERE = {
    "lr": "learning_rate",
    "bs": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "max_length": "seq_len",
    "max_seq_length": "seq_len",
    "cutoff_len": "seq_len",
    "sequence_len": "seq_len",
    "gradient_accumulation_steps": "grad_accum_steps",
    "max_steps": "train.max_steps",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "lora_plus_ratio": "method.b_learning_rate_ratio",
    "loraplus_lr_ratio": "method.b_learning_rate_ratio",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "warmup_ratio": "train.warmup",
    "eval_steps": "train.eval_every",
    "save_steps": "train.checkpoint_every",
    "save_total_limit": "train.keep_checkpoints",
    "early_stopping_patience": "train.early_stopping",
    "resume_from_checkpoint": "resume",
    "r": "method.rank",
    "lora_r": "method.rank",
    "lora_rank": "method.rank",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "load_in_4bit": "method=qlora",
    "bf16": "precision=bf16",
    "fp16": "precision=fp16",
    "dataset": "data.path",
    "columns": "data.map",
    "model_name_or_path": "model.path",
}
"""What other trainers call a setting, where the spelling alone would not lead to ours."""


def known_keys() -> list[str]:
    """Return every dotted key a user may set, groups included."""
    return [setting.key for setting in settings_of(TrialConfig)]


def unknown_key(key: str) -> str:
    """Say that a setting does not exist, and which one is near."""
    if key.partition(".")[0] == "hydra":
        return f"'{key}' is not a setting of Hydra. python -m lora_lab --cfg hydra lists them."
    meant = _ELSEWHERE.get("columns" if key.startswith("data.columns") else key.rpartition(".")[2])
    if meant is not None:
        return f"'{key}' is not a setting of lora_lab. Did you mean {meant}?"
    near = difflib.get_close_matches(key, known_keys(), n=3, cutoff=0.6)
    hint = f"Did you mean {' or '.join(near)}?" if near else "python -m lora_lab --cfg job lists every setting."
    return f"'{key}' is not a setting of lora_lab. {hint}"


def help_text(group: str = "") -> str:
    """Describe the settings outside the groups, or those of a group: key, meaning and default, for `--help`."""
    lines: list[str] = []
    for setting in settings_of(TrialConfig):
        above, _, name = setting.key.rpartition(".")
        if above == group and setting.group is None:
            default = getattr(setting.field.default, "name", setting.field.default)
            shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
            words = textwrap.wrap(f"{setting.help} ({shown})", _WIDTH - _LEFT)
            lines += [f"    {name:<{_LEFT - 4}}{words[0]}", *(" " * _LEFT + line for line in words[1:])]
    return "\n".join(lines)
