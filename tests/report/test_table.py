"""A table of trials: which rows and columns there are, and what their cells hold."""

import csv
import io
from pathlib import Path

import pytest
from planted import deliver, trial

from lora_lab.config import InvalidInput
from lora_lab.report.__main__ import main
from lora_lab.report.measures import ENERGY, LOSS, THROUGHPUT, VRAM
from lora_lab.report.writing.table import Cell, Table, make_table


def rate(value: float) -> dict[str, float]:
    return {THROUGHPUT.key: value}


def column(table: Table, name: str) -> list[Cell]:
    return [row[table.columns.index(name)] for row in table.cells]


def test_repeats_are_one_row_with_their_median() -> None:
    trials = [trial(rate(value), repeat=number) for number, value in enumerate((100.0, 900.0, 110.0))]
    trials += [trial(rate(200.0), optimizer="paged_adamw")]
    table = make_table(trials)
    assert column(table, "point") == ["adamw", "paged_adamw"]
    assert column(table, "n") == [3, 1]
    assert column(table, THROUGHPUT.key) == [110.0, 200.0]
    assert column(make_table(trials, [THROUGHPUT.key], each=True), THROUGHPUT.key) == [100.0, 900.0, 110.0, 200.0]


def test_default_columns_leave_out_what_nobody_has() -> None:
    table = make_table([trial(rate(1.0) | {VRAM.key: 2.0, LOSS.key: 12.0}, model__weights="random")])
    assert table.columns == ("point", "n", "outcome", THROUGHPUT.key, VRAM.key)


def test_figures_of_invalid_and_killed_trials_do_not_count() -> None:
    trials = [
        trial(rate(100.0)),
        trial(rate(1.0), repeat=1, validity="invalid"),
        trial(rate(2.0), repeat=2, outcome="killed"),
        trial({"out_of_memory/asked_gib": 3.0}, outcome="out_of_memory", seq_len="2048"),
    ]
    table = make_table(trials, ["n", "outcome", THROUGHPUT.key, "out_of_memory/asked_gib"])
    assert table.cells == (
        (1, "1 finished, 1 finished (invalid), 1 killed", 100.0, None),
        (1, "out_of_memory", None, 3.0),
    )


def test_places_are_never_averaged() -> None:
    table = make_table([trial(rate(1.0)), trial(rate(2.0), unit="GPU-2")])
    assert column(table, THROUGHPUT.key) == [1.0, 2.0]
    assert len(set(column(table, "place"))) == 2


def test_settings_and_tags_are_columns_with_every_value_of_a_row() -> None:
    trials = [trial(rate(1.0)), trial(rate(1.0), repeat=1, tags={"ran.attention_kernel": "flash"})]
    table = make_table(trials, ["optimizer.optim", "seed", "tag:ran.attention_kernel", "tag:absent"])
    assert table.cells == (("adamw_torch", "0, 1", "cudnn, flash", None),)


def test_a_misspelt_column_is_refused_with_what_it_may_mean() -> None:
    with pytest.raises(InvalidInput, match=THROUGHPUT.key):
        make_table([trial(rate(1.0))], ["throughput/tokens_per_secnd"])
    with pytest.raises(InvalidInput, match="tag:device"):
        make_table([trial(rate(1.0))], ["device"])
    assert make_table([trial(rate(1.0))], [ENERGY.key]).cells == ((None,),)


def test_the_command_prints_the_table_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = deliver(tmp_path, [trial(rate(1234.5)), trial(rate(2.0), optimizer="paged_adamw", model="a|b\nc")])
    asked = ["--store", store, "--columns", f"point,model,{THROUGHPUT.key}", "--table"]
    assert main([*asked, "csv"]) == 0
    told = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [float(row[THROUGHPUT.key]) for row in told] == [1234.5, 2.0]
    assert main([*asked, "md"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert {line.replace(r"\|", "").count("|") for line in lines} == {4}
    assert main([*asked, "text"]) == 0
    assert "1,234" in capsys.readouterr().out


@pytest.mark.parametrize("unused", [["--each"], ["--columns", "n"], ["--table", "md", "--baseline", "optimizer=adamw"]])
def test_options_that_would_go_unused_are_refused(unused: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(unused)
    assert ended.value.code == 2
