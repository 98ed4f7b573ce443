"""Count the work of a sweep's points before they run; points that share a model or rows share what that takes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lora_lab.config import TrackingConfig, TrialConfig
from lora_lab.method_config import OptimizerConfig
from lora_lab.work import ModelFacts, Workload
from lora_lab.worker.examples import Examples
from lora_lab.worker.models import load_architecture
from lora_lab.worker.workload import general_of, model_facts, work_on

_MICRO_BATCHES = 200
"""Of an epoch are laid out: enough for the mean time of a step."""


class Works:
    """Counts the work of one config after the other."""

    def __init__(self) -> None:
        self._architectures: dict[str, Any] = {}
        self._models: dict[str, ModelFacts] = {}
        self._works: dict[str, Workload] = {}

    def of(self, config: TrialConfig, examples_of: Callable[[TrialConfig], tuple[Examples, int]]) -> Workload | None:
        """Return the work, with a part of the epoch's micro-batches; None where it cannot be counted.

        Args:
            examples_of: gives a config's examples, and the token that rows are padded with.
        """
        key = str(_what_decides(config))
        if key not in self._works:
            try:
                general = general_of(config, self._architecture(config))
                work = work_on(config, self._model(config), *examples_of(config), general, _MICRO_BATCHES)
            except Exception:  # the check goes on with the next point: a forecast is worth less than that
                return None
            self._works[key] = work
        return self._works[key]

    def _architecture(self, config: TrialConfig) -> Any:
        key = str(config.model)
        if key not in self._architectures:
            self._architectures[key] = load_architecture(config.model)
        return self._architectures[key]

    def _model(self, config: TrialConfig) -> ModelFacts:
        key = f"{config.model} {config.method} {config.precision} {config.attention}"
        if key not in self._models:
            self._models[key] = model_facts(config, self._architecture(config))
        return self._models[key]


def _what_decides(config: TrialConfig) -> TrialConfig:
    """Return the config without what changes nothing of the work."""
    return replace(config, optimizer=OptimizerConfig(), learning_rate=1.0, max_grad_norm=1.0, tracking=TrackingConfig())
