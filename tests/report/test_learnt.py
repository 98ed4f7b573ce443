"""Held-out losses of settings, paired by row: which differ from the lowest, and which are faster but worse."""

import json
from collections.abc import Sequence

import numpy as np
import pytest
from planted import trial

from lora_lab.quality.answer_rows import AnswerRow, as_table, read_answers
from lora_lab.quality.row_losses import TAG, HeldoutRows, heldout_rows
from lora_lab.report.answers.best.candidates import Wish
from lora_lab.report.answers.best.choice import choose
from lora_lab.report.answers.learnt import Learnt, learnt
from lora_lab.report.findings import Question, find
from lora_lab.report.measures import LOSS, THROUGHPUT
from lora_lab.report.writing.page.page import page
from lora_lab.report.writing.table import make_table
from lora_lab.store.mlflow_names import LONGEST_TAG
from lora_lab.store.trials import Trial

TOKENS = tuple(range(20, 84))
"""Of 64 rows."""
HARD = np.random.default_rng(3).uniform(1, 4, len(TOKENS))
"""Nats per token of each row: rows differ far more than settings do."""


def of_loss(
    shift: float, speed: float, digest: str = "rows", seed: int = 0, spread: float = 0.02, **more: str
) -> Trial:
    """A trial whose rows are all `shift` nats per token harder, but for a small scatter."""
    scatter = np.random.default_rng(seed).normal(0, spread, len(TOKENS))
    nats = (HARD + shift + scatter) * TOKENS
    rows = HeldoutRows(digest=digest, nats=tuple(float(f"{each:.6g}") for each in nats), tokens=TOKENS)
    loss = sum(rows.nats) / sum(rows.tokens)
    return trial({LOSS.key: loss, THROUGHPUT.key: speed}, tags={TAG: rows.written()}, **more)


def answers(*settings: Sequence[Trial]) -> list[Learnt]:
    found = learnt(settings)
    assert None not in found
    return [each for each in found if each is not None]


def test_a_small_difference_is_seen_by_pairs_and_none_where_there_is_none() -> None:
    lowest, same, worse = answers(
        [of_loss(0.0, 100, seed=1)], [of_loss(0.0, 100, seed=2)], [of_loss(0.03, 100, seed=3)]
    )
    if not lowest.is_lowest:
        lowest, same = same, lowest
    assert (lowest.is_lowest, lowest.over_lowest) == (True, None)
    assert same.over_lowest is not None
    assert worse.over_lowest is not None
    assert not same.over_lowest.is_seen
    assert worse.over_lowest.is_seen
    assert worse.over_lowest.value == pytest.approx(0.03, abs=0.01)
    width = (worse.over_lowest.high or 0) - (worse.over_lowest.low or 0)
    assert 0.005 < width < 0.03, "unpaired, rows that differ by nats would give 0.4"


def test_faster_but_worse_needs_both() -> None:
    slow, fast, faster_and_same, worse = answers(
        [of_loss(0.0, 100, seed=1)],
        [of_loss(0.05, 150, seed=2)],
        [of_loss(0.0, 150, seed=1)],
        [of_loss(0.05, 100.5, seed=3)],
    )
    assert fast.worse_than == 0, "the other fast one is as fast"
    assert "faster but worse" in fast.words
    assert (slow.worse_than, faster_and_same.worse_than, worse.worse_than) == (None, None, None)
    assert "faster" not in worse.words


def test_repeats_are_averaged_row_by_row() -> None:
    _, other = answers(
        [of_loss(0.0, 100, seed=seed) for seed in (1, 2, 3)], [of_loss(0.02, 100, seed=seed) for seed in (4, 5, 6)]
    )
    assert other.over_lowest is not None
    assert other.over_lowest.value == pytest.approx(0.02, abs=0.005)


def test_other_rows_are_not_paired_and_random_weights_have_no_loss() -> None:
    _, other, none = learnt(
        [[of_loss(0.0, 1)], [of_loss(0.1, 1, digest="others")], [of_loss(0.0, 1, model__weights="random")]]
    )
    assert other is not None
    assert other.over_lowest is None
    assert none is None


def test_a_tag_that_a_store_has_cut_holds_no_rows() -> None:
    text = of_loss(0, 1).tags[TAG]
    assert len(text) < LONGEST_TAG
    assert heldout_rows({TAG: text}) is not None
    for cut in range(0, len(text) - 1, 37):
        assert heldout_rows({TAG: text[:cut]}) is None
    assert heldout_rows({TAG: '{"digest": "a", "nats": [1.0], "tokens": [1, 2]}'}) is None
    assert heldout_rows({TAG: "[]"}) is None
    assert heldout_rows({}) is None


def test_best_compares_losses_by_their_rows() -> None:
    trials = [of_loss(0.0, 100, seed=1), of_loss(0.03, 150, seed=2, batch_size="2"), of_loss(0.3, 200, batch_size="4")]
    least = trials[0].metrics[LOSS.key]
    found = choose(trials, Wish(objective=THROUGHPUT, max_loss_increase=0.05 / least))
    assert found.best is not None
    assert found.best.trials == (trials[1],)
    assert any("1 configuration with a held-out loss above" in line for line in found.left_out)
    assert not any("may lie above" in line for line in found.remarks)
    near = choose(
        trials, Wish(objective=THROUGHPUT, max_loss_increase=(trials[1].metrics[LOSS.key] - least + 0.001) / least)
    )
    assert any("may lie above" in line for line in near.remarks)


def test_table_and_page_say_it_and_show_the_answers() -> None:
    trials = [of_loss(0.0, 100, seed=1), of_loss(0.05, 150, seed=2, batch_size="2")]
    table = make_table(trials)
    first, second = (str(row[table.columns.index("loss")]) for row in table.cells)
    assert first == "lowest"
    assert second.endswith("faster but worse")
    row = AnswerRow(
        prompt="<|user|> How?",
        gold="So.",
        base="<b>And",
        tuned="So.",
        base_ended=False,
        tuned_ended=True,
        base_tokens=128,
        tuned_tokens=2,
    )
    rows = {trials[1].run_id: [row] * 20}
    html = page(find(trials, [], Question(), "1"), {}, rows)
    assert html.count("&lt;|user|&gt; How?") == 8
    assert html.count("cut at 128 tokens") == 8
    assert "&lt;b&gt;And" in html
    assert html.count("faster but worse") == 1
    assert "Answers before and after" not in page(find(trials, [], Question(), "1"), {})


def test_answers_are_read_back_and_make_a_table(tmp_path) -> None:
    row = AnswerRow(
        prompt="p", gold="ä", base="b", tuned="t", base_ended=True, tuned_ended=False, base_tokens=1, tuned_tokens=2
    )
    file = tmp_path / "answers.jsonl"
    assert read_answers(file) == ([], None)
    file.write_text(f"{row.encode()}\n{row.encode()}\n{{", encoding="utf-8")
    assert read_answers(file) == ([row, row], None)
    table = json.loads(json.dumps(as_table([row])))
    assert dict(zip(table["columns"], table["data"][0], strict=True))["gold"] == "ä"
    file.write_text('{"prompt": 3}\n', encoding="utf-8")
    assert read_answers(file)[1] is not None
