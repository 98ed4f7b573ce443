"""batch_size=max and seq_len=max: a sweep looks for the largest that fits. The card is a fake one of 8 GiB. The
CPU runs its trials up to a number of tokens; a trial of more ends as out of memory."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import FAKES, Said, give_store, lab_in, records_in, store_of, with_fakes
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.sweep.largest import Bounds, Search

QUICK = (
    *("measure=quick", "measure.steps=1", "measure.warmup_steps=0", "measure.eval_rows=0", "measure.idle_seconds=0"),
    *("model=tiny", "method=lora", "precision=fp32", "data=random_tokens", "data.rows=32"),
)
CARD = {"CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "1"}


def run(folder: Path, tokens: int, *arguments: str) -> Said:
    """Run a command on a card that takes micro-batches of so many tokens."""
    plan = folder / "sabotage.json"
    plan.write_text(json.dumps({"small card": [str(tokens), ""]}))
    path = os.pathsep.join([str(FAKES / "saboteur"), with_fakes()])
    return lab_in(folder)(*arguments, PYTHONPATH=path, SABOTAGE=str(plan), **CARD)


def tried(records: list[dict[str, Any]], setting: str) -> dict[int, str]:
    return {int(record["params"][setting]): record["outcome"] for record in records}


def answers(said: Said) -> list[str]:
    return [line for line in said.out.splitlines() if "largest that finished:" in line]


@st.composite
def bounds(draw: st.DrawFn) -> Bounds:
    unit = draw(st.sampled_from([1, 64]))
    certain = draw(st.integers(0, 5000))
    possible = max(1, certain + draw(st.integers(0, 5000)))
    further = draw(st.sampled_from([None, 4]))
    return Bounds(unit=unit, certain=certain * unit, possible=possible * unit, further=further)


@given(bounds(), st.integers(0, 12_000))
def test_bisection_finds_the_largest_that_fits_within_its_bounds(where: Bounds, fitting: int) -> None:
    limit, seen = fitting * where.unit, dict[int, bool]()
    while (value := where.following(seen)) is not None:
        assert value not in seen, "nothing is tried twice"
        assert where.unit <= value <= where.possible
        assert value % where.unit == 0
        seen[value] = value <= limit
    finished = max((value for value, fits in seen.items() if fits), default=0)
    failed = min((value for value, fits in seen.items() if not fits), default=where.possible + where.unit)
    if where.further is None:
        assert finished == min(limit // where.unit * where.unit, where.possible)
        assert failed - finished == where.unit
        assert len(seen) <= 1 + (where.possible // where.unit).bit_length()
    else:
        assert len(seen) <= 1 + where.further
    if seen[next(iter(seen))]:
        assert len(seen) <= 1 + where.most_further


@pytest.mark.nightly
def test_a_search_for_each_card_ends_at_the_largest_batch_that_finishes(tmp_path: Path, empty_store: Path) -> None:
    give_store(tmp_path, empty_store)
    said = run(tmp_path, 1500, "-m", "batch_size=max", "vram_limit_gib=0.75,1.2", *QUICK, "seq_len=1024")
    assert said.code == 0, said.text
    small, large = answers(said)
    assert "vram_limit_gib=0.75" in small
    assert "vram_limit_gib=1.2" in large
    for line in (small, large):
        assert "batch_size=1;" in line
        assert "out of memory: 2" in line
    assert "wrong" not in small, "nothing was said to fit for certain"
    assert "wrong" in large

    records = records_in(tmp_path)
    for limit in ("0.75", "1.2"):
        outcomes = tried([record for record in records if record["params"]["vram_limit_gib"] == limit], "batch_size")
        assert outcomes.keys() >= {1, 2}
        assert outcomes == {rows: "finished" if rows == 1 else "out_of_memory" for rows in outcomes}
    names = [record["name"] for record in records]
    assert len(set(names)) == len(names), names

    [plan] = tmp_path.glob("multirun/*/*/sweep.json")
    rows = (plan.parent / "trials.csv").read_text().splitlines()
    assert len(rows) == 1 + len(records)
    _, runs = store_of(tmp_path)
    [sweep] = [run for run in runs if "largest" in run.data.tags]
    assert sweep.data.tags["largest"].splitlines() == [small, large]
    assert sweep.data.metrics["sweep/trials"] == len(records)
    assert "batch_size=max" in sweep.data.tags["command"].split()
    parents = [run.data.tags.get("mlflow.parentRunId") for run in runs if run is not sweep]
    assert parents == [sweep.info.run_id] * len(records)


@pytest.mark.nightly
def test_a_search_for_the_longest_rows_goes_in_steps_of_64_and_ends_after_five_trials(tmp_path: Path) -> None:
    limit = ("vram_limit_gib=1.2", "tracking=none")
    said = run(tmp_path, 900, "-m", "seq_len=max", "batch_size=1", *QUICK, *limit)
    assert said.code == 0, said.text
    outcomes = tried(records_in(tmp_path), "seq_len")
    assert len(outcomes) <= 5
    assert all(length % 64 == 0 for length in outcomes)
    longest = max(length for length, outcome in outcomes.items() if outcome == "finished")
    shortest = min(length for length, outcome in outcomes.items() if outcome == "out_of_memory")
    assert longest <= 900 < shortest
    [answer] = answers(said)
    assert f"seq_len={longest};" in answer
    assert f"out of memory: {shortest}" in answer


@pytest.mark.nightly
def test_a_preset_can_ask_for_the_largest_which_the_data_may_limit(tmp_path: Path) -> None:
    (tmp_path / "own" / "sweep").mkdir(parents=True)
    grid = "{mode: MULTIRUN, sweeper: {params: {batch_size: max}}}"
    (tmp_path / "own" / "sweep" / "mine.yaml").write_text(f"# @package _global_\nhydra: {grid}\n")
    few = ("data.rows=2", "vram_limit_gib=1.2", "tracking=none", "seq_len=64")
    said = run(tmp_path, 10**6, "--config-dir", "own", "sweep=mine", *QUICK, *few)
    assert said.code == 0, said.text
    assert tried(records_in(tmp_path), "batch_size") == {1: "finished"}, "one of two rows is held out"
    [answer] = answers(said)
    assert "batch_size=1;" in answer
    assert "not known (the data" in answer


def test_another_outcome_than_out_of_memory_ends_a_search_and_the_answer_says_so(tmp_path: Path) -> None:
    old = {"PYTHONPATH": with_fakes(), "CUDA_VISIBLE_DEVICES": "0", "FAKE_NVML_CAPABILITY": "7.5"}
    said = lab_in(tmp_path)("-m", "batch_size=max", *QUICK, "precision=bf16", "tracking=none", **old)
    assert said.code == 3, said.text
    assert list(tried(records_in(tmp_path), "batch_size").values()) == ["unsupported"]
    [answer] = answers(said)
    assert "unsupported" in answer


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (("-m", "batch_size=max", "seq_len=max"), "batch_size=max seq_len=512,1024"),
        (("-m", "batch_size=max,4", "repeats=auto", "contrast=batch_size"), "repeats=auto"),
        (("-m", "batch_size=max", "resume=true"), "resume=true"),
        (("-m", "seq_len=max", "train.max_steps=10"), "train.max_steps"),
        (("-m", "seq_len=max", "device=cpu"), "seq_len=512,1024,2048"),
        (("-m", "batch_size=max", "model.architecture.model_type=opt"), "batch_size=1,2,4,8"),
        (("batch_size=max",), "-m batch_size=max"),
    ],
    ids=["both", "repeats", "resume", "job", "cpu", "unknown family", "without -m"],
)
def test_what_cannot_be_looked_for_is_refused_with_what_to_type(
    tmp_path: Path, arguments: tuple[str, ...], advice: str
) -> None:
    said = run(tmp_path, 1, *QUICK, "tracking=none", *arguments)
    assert said.code == 2, said.text
    assert advice in said.err
    assert not records_in(tmp_path)


def test_an_answer_gives_the_estimate_as_reason_only_where_all_below_it_was_tried() -> None:
    def answer(possible: int, *tried: int) -> str:
        where = Bounds(unit=64, certain=64, possible=possible, further=4)
        search = Search("seq_len", ["seq_len=max"], where, beyond="by the estimate")
        search.tried = dict.fromkeys(tried, True)
        return search.answer_line

    assert "by the estimate" in answer(128, 64, 128)
    used_up = answer(64 * 100, 64, 3200, 4800, 5600, 6016)
    assert "seq_len=6016;" in used_up
    assert "5 trials" in used_up
    assert "by the estimate" not in used_up
    assert "the sweep ended before" in answer(64 * 100, 64)
