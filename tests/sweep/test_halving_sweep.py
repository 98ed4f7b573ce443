"""A sweep by halving through the command line: its rungs, its records, its resume and its report."""

import html
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import Said, give_store, lab_in, records_in, started, store_of, until

from lora_lab.comparison.halving import CONTENDER, NOT_STOPPED, RUNG, STOPPED, VALUE

QUICK = (
    *("model=tiny", "seq_len=16", "data=random_tokens", "data.rows=16", "measure.warmup_steps=0"),
    *("measure.eval_rows=4", "measure.idle_seconds=0", "precision=fp32", "isolation=inline"),
)
LINES = (
    "method=lora learning_rate=1e-3,1e-2,1e30",
    "method=full optimizer=lomo max_grad_norm=0 learning_rate=1e-2",
)
"""The third rate of LoRA diverges; the other contender has nothing to search."""


def write_sweep(folder: Path, lines: tuple[str, ...] = LINES, **halving: Any) -> tuple[str, ...]:
    """Write a sweep file. Returns the words that run it."""
    (folder / "own" / "sweep").mkdir(parents=True, exist_ok=True)
    asked = {"best_of": "learning_rate", "length": "measure.steps", "rungs": [2, 3, 4]} | halving
    grid = json.dumps({"mode": "MULTIRUN", "sweeper": {"points": list(lines), "halving": asked}})
    (folder / "own" / "sweep" / "mine.yaml").write_text(f"# @package _global_\nhydra: {grid}\n")
    return ("--config-dir", "own", "sweep=mine", *QUICK)


def tags(records: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Rung, contender, value and whether it stopped, of each trial."""
    found = [each["tags"] for each in records]
    return sorted((t[RUNG], t[CONTENDER], t[VALUE], t.get(STOPPED, "the last rung")) for t in found)


def run(folder: Path, *words: str) -> Said:
    return lab_in(folder)(*words)


def test_losers_stop_early_and_a_sweep_that_was_killed_goes_on_where_it_was(tmp_path: Path, empty_store: Path) -> None:
    give_store(tmp_path, empty_store)
    words = write_sweep(tmp_path)
    with started(tmp_path, *words) as process:
        until(lambda: len(list(tmp_path.glob("multirun/2*/*/*/record.json"))) >= 4, "a trial of the second rung")
        os.killpg(process.pid, signal.SIGKILL)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("multirun/2*/*/*/summary.json")}

    said = run(tmp_path, *words, "resume=true")
    assert said.code == 0, said.text
    assert all(path.stat().st_mtime_ns == then for path, then in before.items()), "nothing was measured again"

    records = [each for each in records_in(tmp_path) if each["outcome"] != "killed"]
    found = tags(records)
    rates = Counter((rung, contender) for rung, contender, _, _ in found)
    assert rates == {("1 of 3", "lora"): 3, ("2 of 3", "lora"): 2, ("3 of 3", "lora"): 1} | {
        ("3 of 3", "lomo full max_grad_norm=0"): 1
    }, "the second has one rate, so it skips the rungs that would decide nothing"
    wrong = [each for each in found if each[2] == "learning_rate=1e+30"]
    assert [(rung, why.split(":")[0]) for rung, _, _, why in wrong] == [("1 of 3", "it ended as diverged")]
    losses = {each["tags"][VALUE]: each["metrics"]["loss/eval"] for each in records if each["tags"][RUNG] == "2 of 3"}
    best = min(losses, key=lambda value: losses[value])
    assert {value for rung, _, value, _ in found if rung == "3 of 3"} == {best, "learning_rate=0.01"}
    reasons = {value: why for rung, _, value, why in found if rung == "2 of 3"}
    assert reasons.pop(best) == NOT_STOPPED
    assert [f"behind {losses[best]:.4f} of {best}" in why for why in reasons.values()] == [True]
    assert {each["params"]["measure.steps"] for each in records if each["tags"][RUNG] == "3 of 3"} == {"4"}

    _, runs = store_of(tmp_path)
    stored = [each.data.tags for each in runs if RUNG in each.data.tags and each.info.status != "KILLED"]
    assert tags([{"tags": each} for each in stored]) == found, "MLflow has the reasons, too"
    [sweep] = [each for each in runs if "halving" in each.data.tags]
    assert f"lora: {best} of " in sweep.data.tags["halving"]

    shown = lab_in(tmp_path, "lora_lab.report")()
    assert shown.code == 0, shown.text
    [row] = [line.split() for line in shown.out.splitlines() if line.startswith("lora  ")]
    assert row[1] == best.partition("=")[2]
    assert row[-1] == "1"
    assert "Which of 2 configurations" in shown.out, "the earlier rungs are not compared"
    [page] = tmp_path.glob("multirun/2*/*/report.html")
    text = html.unescape(page.read_text())
    assert "Each at its best learning_rate" in text
    assert "it ended as diverged" in text


@pytest.mark.parametrize(
    ("halving", "more", "advice"),
    [
        ({"rungs": [4]}, (), "rungs=[50,100,200]"),
        ({"rungs": [4, 2]}, (), "longer than the one before"),
        ({"best_of": "learning_rat"}, (), "Did you mean learning_rate"),
        ({}, ("measure.steps=5",), "Give hydra.sweeper.halving.rungs"),
        ({}, ("repeats=auto", "contrast=learning_rate"), "repeats=3"),
        ({}, ("measure.eval_rows=0",), "measure.eval_rows=0"),
        ({"best_of": "seq_len"}, (), "no point has two values"),
        ({"rungs": [2, 10**9]}, (), "measure.steps"),
        ({}, ("cotrain=learning_rate", "isolation=process"), "Leave one of them out"),
    ],
    ids=["one rung", "falling", "typo", "length", "auto", "no rows", "one value", "too long", "cotrain"],
)
def test_what_cannot_be_halved_is_refused_with_what_to_type(
    tmp_path: Path, halving: dict[str, Any], more: tuple[str, ...], advice: str
) -> None:
    lines = ("method=lora learning_rate=1e-3,1e-2",)
    said = run(tmp_path, *write_sweep(tmp_path, lines, **halving), "tracking=none", *more)
    assert said.code == 2, said.text
    assert advice in said.err
    assert not records_in(tmp_path)
