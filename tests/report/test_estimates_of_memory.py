"""How far off estimates of memory were: which trials count, and where it is said."""

import csv
import io
from pathlib import Path

import pytest
from planted import deliver, trial

from lora_lab.report.__main__ import main
from lora_lab.report.answers.estimates import Estimates
from lora_lab.report.findings import Findings, Question, find
from lora_lab.report.measures import THROUGHPUT
from lora_lab.report.writing.estimates import estimate_sentences
from lora_lab.report.writing.page.page import page
from lora_lab.store.trials import Trial

KINDS = ("card", "reserved", "allocated")


def foretold(
    error: float | None, verdict: str = "fits", key: str = "card", why: str = "rows were shorter: 3 of 9", **more: str
) -> Trial:
    """A trial that was said to take 10 GiB, from 9 to 12."""
    metrics = {THROUGHPUT.key: 100.0} if more.get("outcome", "finished") == "finished" else {}
    metrics |= {"estimate/card_gib": 10.0, "estimate/low_gib": 9.0, "estimate/high_gib": 12.0}
    tags = {"estimate_verdict": verdict, "phase": more.pop("phase", "window")}
    if error is None:
        tags |= {f"absent.estimate/{each}_error": why for each in KINDS}
    else:
        metrics |= {f"estimate/{each}_error": error for each in KINDS[KINDS.index(key) :]}
    return trial(metrics, tags=tags, **more)


def found_in(*trials: Trial) -> Findings:
    return find(trials, (), Question(), "1.0")


def estimates_of(*trials: Trial) -> Estimates | None:
    [group] = found_in(*trials).groups
    return group.estimates


def test_nothing_is_said_where_no_record_has_an_estimate() -> None:
    findings = found_in(trial({THROUGHPUT.key: 100.0}))
    assert findings.groups[0].estimates is None
    assert estimate_sentences(findings.groups[0]) == []
    assert 'id="estimates"' not in page(findings, {})


def test_errors_are_averaged_by_size_and_the_worst_is_named() -> None:
    said = estimates_of(
        foretold(0.05, batch_size="1"), foretold(-0.25, batch_size="2"), foretold(-0.03, batch_size="4")
    )
    assert said is not None
    assert said.errors is not None
    assert (said.errors.trials, said.errors.worst, said.errors.worst_at) == (3, -0.25, 1)
    assert said.errors.mean == pytest.approx(0.11)
    assert said.errors.within == 2, "10 GiB that was said is 13.3 GiB measured, above the interval"
    assert (said.apart, said.fits_but_ran_out, said.too_large_but_finished) == ({}, (), ())


def test_without_the_process_what_torch_reserved_is_compared_and_no_interval() -> None:
    said = estimates_of(foretold(0.05, key="reserved"), foretold(0.02, key="allocated", repeat="1"))
    assert said is not None
    assert said.errors is not None
    assert (said.errors.of.key, said.errors.trials, said.errors.within) == ("estimate/reserved_gib", 1, None)


def test_wrong_verdicts_are_named_both_ways() -> None:
    findings = found_in(
        foretold(0.0, batch_size="1"),
        foretold(0.2, verdict="too large", batch_size="2"),
        foretold(None, batch_size="4", outcome="out_of_memory", validity="unknown"),
        foretold(None, verdict="doubtful", batch_size="8", outcome="out_of_memory", validity="unknown"),
        foretold(None, verdict="too large", batch_size="16", outcome="out_of_memory", validity="unknown"),
        foretold(None, batch_size="32", outcome="out_of_memory", validity="invalid"),
        foretold(None, verdict="too large", batch_size="64"),
        foretold(None, batch_size="128", outcome="out_of_memory", validity="unknown", phase="evaluation_before"),
    )
    [group] = findings.groups
    assert group.estimates is not None
    assert (group.estimates.fits_but_ran_out, group.estimates.too_large_but_finished) == ((2,), (1,))
    assert group.estimates.ran_out_elsewhere == (7,)
    said = estimate_sentences(group)
    named = {number for number in (1, 2, 4, 8, 16, 32, 64, 128) if any(f" {number}x512." in each for each in said[1:])}
    assert named == {2, 4, 128}


def test_trials_that_cannot_be_compared_are_counted_by_reason() -> None:
    trials = [foretold(None, why=f"rows were shorter: {number} of 99", repeat=str(number)) for number in range(3)]
    said = estimates_of(*trials, foretold(None, why="the card was full", repeat="3"))
    assert said is not None
    assert said.errors is None
    assert said.apart == {"rows were shorter": 3, "the card was full": 1}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    ran_out = foretold(None, batch_size="4", outcome="out_of_memory", validity="unknown")
    there = [foretold(0.031, batch_size="1"), foretold(-0.123, batch_size="2"), ran_out]
    return deliver(tmp_path_factory.mktemp("estimated"), there)


@pytest.mark.parametrize("more", [[], ["--full"]], ids=["short", "full"])
def test_the_command_says_it_and_the_page_has_it(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    out = tmp_path / "report.html"
    assert main(["--store", store, "--out", str(out), *more]) == 0
    said = capsys.readouterr().out
    assert "7.7 %" in said
    assert "-12.3 % at most (2x512)" in " ".join(said.split())
    assert 'id="estimates"' in out.read_text(encoding="utf-8")


def test_they_are_columns_of_the_table(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    columns = "batch_size,estimate/card_gib,estimate/card_error,tag:estimate_verdict"
    assert main(["--store", store, "--table", "csv", "--columns", columns]) == 0
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))[1:]
    assert sorted(rows) == [
        ["1", "10.0", "0.031", "fits"],
        ["2", "10.0", "-0.123", "fits"],
        ["4", "10.0", "", "fits"],
    ]
