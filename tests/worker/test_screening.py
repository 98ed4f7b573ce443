"""Rows that the model knows: their losses row by row, and what is left out before training."""

import math
from pathlib import Path

import pytest
from test_evaluation import CPU, PAD, examples, tiny
from tiny_trials import ended, tiny_config

from lora_lab.events import DataCounted, Event, PhaseBegan, Warned
from lora_lab.options import Batching, DType
from lora_lab.phase import Phase
from lora_lab.worker import evaluation
from lora_lab.worker.data import IGNORED, Example
from lora_lab.worker.screening import SCREENED, batches_of, row_losses, screen, store_screened, stored_screened
from lora_lab.worker.trial import run_trial

pytestmark = [
    # peft 0.21 still asks transformers 5.23 by the older name
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # transformers 5.23 has a newer name for the setting, 5.17 has not
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
]


def losses_of(model: object, most_tokens: int) -> list[float]:
    done: list[tuple[int, int]] = []
    batches = list(batches_of(examples(), most_tokens))
    found = row_losses(model, examples(), batches, PAD, DType.fp32, CPU, lambda a, b: done.append((a, b)))
    assert done[-1] == (7, 7)
    losses = {
        place: nats
        for places, each in zip(batches, found, strict=True)
        for place, nats in zip(places, each, strict=True)
    }
    return [losses[place] for place in range(7)]


def test_each_rows_loss_is_the_held_out_loss_of_that_row_alone() -> None:
    model = tiny(DType.fp32)
    for batches in (losses_of(model, 64), losses_of(model, 1000)):
        for example, loss in zip(examples(), batches, strict=True):
            alone = evaluation.row_losses(model, [example], 1, PAD, DType.fp32, CPU, lambda *_: None)
            assert loss == pytest.approx(alone.mean, rel=1e-5)
    assert model.training


def row(length: int) -> Example:
    ids = list(range(length))
    return Example(ids, [IGNORED, *ids[1:]])


def test_the_perplexity_of_a_token_decides_and_not_the_length_of_a_row() -> None:
    trained = [row(size).trained for size in (2, 100, 2, 100)]
    found = screen(trained, [math.log(2.9), math.log(2.9), math.log(3.1), math.log(3.1)], 3.0)
    assert (found.dropped, found.kept.tolist()) == ([0, 1], [False, False, True, True])
    assert found.median == pytest.approx(math.sqrt(2.9 * 3.1))
    assert "left out 2 of 4 rows" in found.sentence(3.0)
    assert "trained tokens 50, of the others' 50" in found.sentence(3.0)


def screened(folder: Path, least: float, batching: Batching = Batching.longest) -> list[Event]:
    config = tiny_config()
    config.data.rows, config.data.min_perplexity, config.data.batching = 40, least, batching
    events: list[Event] = []
    run_trial(config, folder, events.append)
    return events


@pytest.fixture
def between(monkeypatch: pytest.MonkeyPatch) -> float:
    """A perplexity that some of the random rows have and others do not."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return math.exp(math.log(272) + 0.05)


def counts(events: list[Event]) -> list[DataCounted]:
    return [event for event in events if isinstance(event, DataCounted)]


def test_rows_below_the_mark_are_not_trained_on_and_the_held_out_ones_stay(tmp_path: Path, between: float) -> None:
    events = screened(tmp_path, between)
    assert ended(events) == ("finished", "")
    before, after = counts(events)
    assert after.rows_low_perplexity is not None
    assert 0 < after.rows_low_perplexity < before.rows_train
    assert after.rows_train == before.rows_train - after.rows_low_perplexity
    assert (after.rows_heldout, after.rows_read) == (before.rows_heldout, before.rows_read)
    assert after.digest != before.digest
    assert any(isinstance(each, Warned) and f"left out {after.rows_low_perplexity} of" in each.text for each in events)
    assert Phase.screening.value in [event.phase for event in events if isinstance(event, PhaseBegan)]


@pytest.mark.nightly
def test_rows_are_packed_after_the_screening(tmp_path: Path, between: float) -> None:
    before, after = counts(screened(tmp_path, between, Batching.packed))
    assert after.rows_low_perplexity is not None
    assert after.rows_train == before.rows_train - after.rows_low_perplexity, "each fills a row by itself"


def test_nothing_left_is_refused(tmp_path: Path, between: float) -> None:
    outcome, reason = ended(screened(tmp_path, 10**6))
    assert outcome == "refused"
    assert "0 rows whose perplexity is data.min_perplexity=1e+06 or more" in reason


@pytest.mark.nightly
def test_without_the_setting_nothing_is_screened(tmp_path: Path, between: float) -> None:
    events: list[Event] = []
    run_trial(tiny_config(), tmp_path, events.append)
    [counted] = counts(events)
    assert counted.rows_low_perplexity == 0


def test_a_resumed_job_keeps_what_was_found_at_its_start(
    tmp_path: Path, between: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    config.data.rows, config.data.min_perplexity, config.train.max_steps = 40, between, 2
    attempts: list[list[Event]] = [[], []]
    run_trial(config, tmp_path, attempts[0].append)
    config.resume = True
    with monkeypatch.context() as patch:  # an adapter or other kernels would give other losses
        patch.setattr("lora_lab.worker.stages.screening.row_losses", lambda *_: pytest.fail("screened again"))
        run_trial(config, tmp_path, attempts[1].append)
    assert [ended(events)[0] for events in attempts] == ["finished"] * 2
    first, again = (counts(events)[1] for events in attempts)
    assert first.rows_low_perplexity
    assert (again.digest, again.rows_low_perplexity) == (first.digest, first.rows_low_perplexity)
    said = [
        [each.text for each in events if isinstance(each, Warned) and "left out" in each.text] for events in attempts
    ]
    assert said[0] == said[1]


def test_what_was_found_holds_for_the_same_rows_and_mark_only(tmp_path: Path) -> None:
    found = screen([3, 4, 5], [0.5, 1.5, 2.5], 3.0)
    store_screened(tmp_path, found, "digest", 3.0)
    assert stored_screened(tmp_path, "digest", 3.0) == found
    assert stored_screened(tmp_path, "digest", 2.0) is None
    assert stored_screened(tmp_path, "other", 3.0) is None
    (tmp_path / SCREENED).write_text('{"digest": "digest", "least": 3.0, "found": {}}')
    assert stored_screened(tmp_path, "digest", 3.0) is None
