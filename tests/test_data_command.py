"""`lora-lab data`: what would be trained is shown and counted, in this process, on the shapes of the tiny model."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from lora_lab import data
from lora_lab.config import TrialConfig
from lora_lab.outcome import EXIT_REFUSED
from lora_lab.worker.preview import Preview, preview

ROWS = [{"instruction": f"question {number}", "output": f"answer {number}, the {number}th"} for number in range(40)]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Preview, TrialConfig]]:
    """Previews that the command made, in an empty folder; looked at in this process, where torch is."""
    found: list[tuple[Preview, TrialConfig]] = []

    def look(config: TrialConfig) -> Preview:
        found.append((preview(config), config))
        return found[-1][0]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lora-lab"])
    monkeypatch.setattr(data, "_in_worker", look)
    return found


def written(rows: list[dict[str, str]]) -> str:
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return "data.path=rows.jsonl"


def printed(found: tuple[Preview, TrialConfig], coloured: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=200, force_terminal=coloured, color_system="standard" if coloured else None)
    data.show(*found, console)
    return stream.getvalue()


def test_what_is_trained_is_shown_and_nothing_else_is_marked(shown: list[tuple[Preview, TrialConfig]]) -> None:
    rows = [*ROWS, ROWS[3], {**ROWS[4], "output": ROWS[4]["output"].upper()}, {**ROWS[5], "output": "another"}]
    assert data.main(["model=tiny", "data=jsonl", written(rows), "seq_len=512"]) == 0
    [found] = shown
    text = printed(found, coloured=False)
    numbers = re.findall(r"question (\d+)<\|im_end\|>", text)
    assert len(numbers) == 3
    for number in numbers:
        assert f"[[answer {number}, the {number}th<|im_end|>]]" in text
    assert text.count("[[answer") == 3
    assert f"\x1b[1;32manswer {numbers[0]}, the {numbers[0]}th<|im_end|>\x1b[0m" in printed(found, coloured=True)
    assert "43 read" in text
    assert "1 of 43" in text, "equal, and nearly equal"
    counted = found[0].counted
    assert (counted.rows_repeated, counted.rows_near_repeated, counted.rows_dropped) == (1, 1, 0)
    assert not list(Path().glob("multirun*")), "nothing is left behind"


def test_lengths_and_shares_are_those_of_the_rows(shown: list[tuple[Preview, TrialConfig]]) -> None:
    """The tokenizer has a token for each byte, so that the lengths follow from the texts."""
    rows = [{"instruction": "q" * 10, "output": "a" * length} for length in [*range(1, 40), 400]]
    assert data.main(["model=tiny", "data=jsonl", written(rows), "seq_len=128", "batch_size=1"]) == 0
    [(found, _)] = shown
    around = found.counted.length_max - 400  # of the template and the question
    assert found.counted.length_median == around + 20
    assert found.counted.length_p95 == around + 38
    assert found.counted.tokens_cut == around + 400 - 128
    assert found.padded["longest"] == 0, "a batch of one row has none"
    real = found.counted.real / (found.counted.rows_train * 128)
    assert found.padded["seq_len"] == pytest.approx(1 - real)
    assert 0 <= found.padded["packed"] < found.padded["seq_len"]
    assert found.scripts == {"Latin": 1.0}


def test_scripts_of_the_answers_are_counted_by_letter(shown: list[tuple[Preview, TrialConfig]]) -> None:
    rows = [{"instruction": f"latin {number}", "output": f"да ok {number}"} for number in range(10)]
    assert data.main(["model=tiny", "data=jsonl", written(rows)]) == 0
    assert shown[0][0].scripts == {"Cyrillic": 0.5, "Latin": 0.5}


def test_a_row_that_would_steer_the_terminal_is_shown_harmless(shown: list[tuple[Preview, TrialConfig]]) -> None:
    rows = [{"instruction": "[bold]q", "output": f"\x1b]0;title\x07 {number}"} for number in range(10)]
    assert data.main(["model=tiny", "data=jsonl", written(rows)]) == 0
    text = printed(shown[0], coloured=False)
    assert "\x1b" not in text
    assert "[bold]q" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data=jsonl", "data.path=nowhere.jsonl"], "there is no such file"),
        (["batch_size=0"], "batch_size=0 must be"),
        (["nothing=1"], "not a setting"),
        (["data=jsonl", "data.sources=[a.jsonl]"], "each with its path or its id"),
        (["data=jsonl", "data.sources=[{path: a, wieght: 1}]"], "each with its path or its id"),
        (["data=jsonl", "data.sources=[{weight: 1}]"], "neither path nor id"),
        (["-m", "batch_size=1,2"], "Leave -m"),
        (["sweep=paper"], "sweep=NAME out"),
    ],
)
def test_what_a_trial_would_refuse_is_refused(
    shown: list[tuple[Preview, TrialConfig]], capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    try:
        code = data.main(["model=tiny", *arguments])
    except SystemExit as left:
        code = left.code  # type: ignore[assignment]
    assert code == EXIT_REFUSED
    assert words in capsys.readouterr().err
    assert not shown
