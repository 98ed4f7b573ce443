"""A look at a point before it runs, and the trial itself, find the same faults."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_trials import ended, tiny_config

from lora_lab.config import TrainConfig, TrialConfig
from lora_lab.events import Event
from lora_lab.look import Look
from lora_lab.method_config import OptimizerConfig
from lora_lab.work import ModelFacts
from lora_lab.worker import check, works
from lora_lab.worker.check import check_trials
from lora_lab.worker.trial import run_trial
from lora_lab.worker.workload import model_facts, workload


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


def test_each_points_own_work_is_counted_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points that share a model count it once; one that would be refused has no work."""
    counted: list[TrialConfig] = []

    def facts(config: TrialConfig, architecture: object) -> ModelFacts:
        counted.append(config)
        return model_facts(config, architecture)

    monkeypatch.setattr(works, "model_facts", facts)
    configs = [tiny_config() for _ in range(4)]
    configs[1].learning_rate *= 2
    configs[2].seq_len = 8
    too_few_rows(configs[3])
    *found, refused = [look.work for look in check_trials(configs, works.Works().of)]
    assert refused is None
    for work, config in zip(found, configs[:3], strict=True):
        alone = workload(config)
        assert work is not None
        assert (work.model, work.epoch, work.steps, work.heldout) == (
            alone.model,
            alone.epoch,
            alone.steps,
            alone.heldout,
        )
    assert len(counted) == 1


def test_a_part_of_the_rows_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(works, "_MICRO_BATCHES", 3)
    config = tiny_config()
    config.data.rows = 40
    [look] = check_trials([config], works.Works().of)
    whole = workload(config)
    assert look.work is not None
    assert look.work.epoch == whole.epoch[:3]
    assert (look.work.steps, look.work.steps_per_epoch) == (whole.steps, whole.steps_per_epoch)
