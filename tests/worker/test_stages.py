"""The list of stages: their order, and a stage more."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from tiny_trials import ended, tiny_config

from lora_lab.events import DataCounted, Event, PhaseBegan, Warned
from lora_lab.phase import Phase
from lora_lab.worker import trial
from lora_lab.worker.stages import STAGES
from lora_lab.worker.stages.stage import Stage, TrialContext

pytestmark = [
    # peft 0.21 still asks transformers 5.23 by the older name
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # transformers 5.23 has a newer name for the setting, 5.17 has not
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
]


def phases_of(events: list[Event]) -> list[Phase]:
    return [Phase(event.phase) for event in events if isinstance(event, PhaseBegan)]


def test_phases_come_in_their_own_order_and_a_stage_more_has_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes after training sees the trained model: an export, say."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    reached: list[Any] = []
    events: list[Event] = []

    def export(context: TrialContext) -> None:
        reached.append((phases_of(events)[-1], context.trainer.state.global_step, type(context.model).__name__))
        context.warn("exported")

    def fails(_: TrialContext) -> None:
        raise AssertionError("it is not needed")

    more = (Stage(None, export), Stage(Phase.conversion, fails, lambda _: False))
    monkeypatch.setattr(trial, "STAGES", (*STAGES, *more))
    config = tiny_config()
    trial.run_trial(config, tmp_path, events.append)
    assert ended(events) == ("finished", "")
    steps = config.measure.warmup_steps + config.measure.steps
    assert reached == [(Phase.saving, steps, "PeftModelForCausalLM")]
    assert any(isinstance(event, Warned) and event.text == "exported" for event in events)
    in_order = list(Phase)
    places = [in_order.index(phase) for phase in phases_of(events)]
    assert all(one < other for one, other in itertools.pairwise(places))
    assert {Phase.start, Phase.data, Phase.model, Phase.warm_up, Phase.window, Phase.saving} <= set(phases_of(events))


def test_nothing_is_evaluated_without_rows_to_evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    events: list[Event] = []
    trial.run_trial(tiny_config(eval_rows=0), tmp_path, events.append)
    assert ended(events) == ("finished", "")
    assert not {Phase.evaluation_before, Phase.evaluation_after} & set(phases_of(events))


def test_a_stage_that_fails_is_the_trials_end_and_no_later_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    events: list[Event] = []

    def fails(context: TrialContext) -> None:
        raise MemoryError(f"{len(context.examples.train)} rows")

    monkeypatch.setattr(trial, "STAGES", (*STAGES[:3], Stage(Phase.model, fails), *STAGES[3:]))
    trial.run_trial(tiny_config(), tmp_path, events.append)
    [counted] = [event for event in events if isinstance(event, DataCounted)]
    assert ended(events) == ("out_of_memory", f"{counted.rows_train} rows")
    assert phases_of(events)[-1] is Phase.model
