"""A trial of the tiny model that takes a few steps in this process."""

from pathlib import Path
from typing import Any

import yaml

from lora_lab.composition.compose import CONF
from lora_lab.composition.validation import faults
from lora_lab.config import MeasureConfig, ModelConfig, TrialConfig
from lora_lab.data_config import DataConfig
from lora_lab.events import Ended, Event
from lora_lab.method_config import MethodConfig, OptimizerConfig, PrecisionConfig
from lora_lab.options import DataSource, DType, ModelSource, Weights
from lora_lab.worker.trial import run_trial


def tiny_config(eval_rows: int = 2, **method: Any) -> TrialConfig:
    """Random tokens that come back, so that the loss falls."""
    return TrialConfig(
        optimizer=OptimizerConfig(optim="adamw_torch"),
        precision=PrecisionConfig(dtype=DType.fp32),
        method=MethodConfig(**method),
        model=ModelConfig(
            source=ModelSource.tiny,
            weights=Weights.random,
            architecture=yaml.safe_load((CONF / "model/tiny.yaml").read_text())["architecture"],
        ),
        data=DataConfig(source=DataSource.random_tokens, rows=4, holdout=0.5),
        measure=MeasureConfig(warmup_steps=1, steps=3, eval_rows=eval_rows, general_rows=0, answers=0),
        seq_len=16,
        learning_rate=0.01,
        share_device=True,
    )


def train(config: TrialConfig, folder: Path) -> list[Event]:
    """Run a trial in this process to its end; return its events."""
    assert faults(config) == []
    events: list[Event] = []
    run_trial(config, folder, events.append)
    assert ended(events) == ("finished", "")
    return events


def ended(events: list[Event]) -> tuple[str, str]:
    """The outcome and its reason."""
    last = events[-1]
    assert isinstance(last, Ended)
    return last.outcome, last.reason
