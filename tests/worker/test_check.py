"""A look at a point before it runs, and the trial itself, find the same faults."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_trials import ended, tiny_config

from lora_lab.config import OptimizerConfig, TrainConfig, TrialConfig
from lora_lab.events import Event
from lora_lab.look import Look
from lora_lab.worker import check
from lora_lab.worker.check import check_trials
from lora_lab.worker.trial import run_trial


def unknown_optimizer(config: TrialConfig) -> None:
    config.optimizer = OptimizerConfig(optim="nothing_like_it")


def too_long(config: TrialConfig) -> None:
    config.seq_len = 10**6


def unknown_modules(config: TrialConfig) -> None:
    config.method.target_modules = ["nowhere"]


def too_few_rows(config: TrialConfig) -> None:
    config.batch_size = 10**4


def too_long_a_warm_up(config: TrialConfig) -> None:
    config.train = TrainConfig(epochs=3.0, warmup=10)


def more_evaluations_than_steps(config: TrialConfig) -> None:
    config.data.rows, config.batch_size = 8, 2
    config.train = TrainConfig(epochs=3.0, warmup=0, eval_every=0.25, checkpoint_every=0.25)


@pytest.mark.parametrize(
    "spoil",
    [
        unknown_optimizer,
        too_long,
        unknown_modules,
        too_few_rows,
        too_long_a_warm_up,
        more_evaluations_than_steps,
    ],
)
def test_a_point_is_refused_before_it_runs_for_what_its_trial_would_be(
    spoil: Callable[[TrialConfig], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = tiny_config()
    spoil(config)
    [look] = check_trials([config])
    assert look.faults
    events: list[Event] = []
    run_trial(config, tmp_path, events.append)
    assert ended(events) == ("refused", "\n".join(look.faults))


def test_points_share_what_they_have_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid of rates and seeds looks at its model and its rows once."""
    looked: list[TrialConfig] = []
    real = check.check_model

    def counted(config: TrialConfig, architecture: object) -> list[str]:
        looked.append(config)
        return real(config, architecture)

    monkeypatch.setattr(check, "check_model", counted)
    configs = [tiny_config() for _ in range(3)]
    for number, config in enumerate(configs):
        config.learning_rate *= 1 + number
        config.seed = number
    assert list(check_trials(configs)) == [Look()] * 3
    assert len(looked) == 1
