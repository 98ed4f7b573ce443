import importlib.util
import json
import os
import statistics
import sys
from collections import Counter
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_server import Running
from conftest import SERVER

from benchmarks.peers import plan, processes
from benchmarks.peers.__main__ import main
from benchmarks.peers.contender import answered
from benchmarks.peers.longest import Search
from benchmarks.peers.material import rows_of
from benchmarks.peers.order import order
from benchmarks.peers.plan import Cell, Setup, Turn, applies, missing_packages
from benchmarks.peers.processes import Contender
from benchmarks.peers.stacks import end_to_end
from benchmarks.peers.stored import joined, read, write_page
from benchmarks.peers.table import ahead_after, loss_difference, ratios, table
from benchmarks.peers.turn import energy
from benchmarks.reports import RESULTS

CPU = {"CUDA_VISIBLE_DEVICES": ""}


def forked(command: list[str], env: dict[str, str], cwd: Path, pass_fds: list[int], **_: Any) -> Running:
    """What subprocess.Popen is to a contender, without the ten seconds of its imports."""
    return SERVER.start(command[2], command[3:], cwd, env, kept=pass_fds)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A dry run of packed rows: three stacks that train, one that can't (a CUDA graph on a CPU), one not installed."""
    out = tmp_path_factory.mktemp("peers")
    line = "--model tiny --cells 2x32p --contenders plain,plain_tutorial,eager,graph,unsloth --rounds 2 --steps 2"
    short = ("--warmup", "1", "--window-seconds", "0", "--device", "cpu", "--note", "a test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "subprocess", SimpleNamespace(**{**vars(processes.subprocess), "Popen": forked}))
        main([str(out), *line.split(), *short])
    found: dict[str, Any] = json.loads((out / "peers_qlora_tiny.json").read_text(encoding="utf-8"))
    found["folder"] = out
    return found


TRAINED = ("plain", "plain_tutorial", "eager")


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is not None, reason="Unsloth is installed")
@pytest.mark.nightly
def test_a_missing_package_is_named(stored: dict[str, Any]) -> None:
    unsloth = stored["cells"]["2x32p"]["unsloth"]
    assert unsloth["outcome"] == "missing_package"
    assert "unsloth_zoo" in unsloth["reason"]
    assert unsloth["turns"] == []


@pytest.mark.nightly
def test_every_round_has_a_turn_of_each_and_padding_is_not_counted(stored: dict[str, Any]) -> None:
    for name in TRAINED:
        result = stored["cells"]["2x32p"][name]
        assert result["outcome"] == "finished", result
        assert [turn["round"] for turn in result["turns"]] == [0, 1]
        for turn in result["turns"]:
            assert len(turn["step_seconds"]) == turn["steps"] == 2
            assert turn["tokens_per_second"] == pytest.approx(turn["tokens"] / turn["window_seconds"])
            assert 0.5 * 2 * 64 < turn["tokens"] < 2 * 64
            assert "peak_allocated_gib" not in turn  # no card
    places = {name: [turn["place"] for turn in stored["cells"]["2x32p"][name]["turns"]] for name in TRAINED}
    assert places["plain"][0] != places["plain"][1]


@pytest.mark.nightly
def test_plain_is_what_the_eager_engine_is_and_only_the_tutorial_raises(stored: dict[str, Any]) -> None:
    results = stored["cells"]["2x32p"]
    turns = [turn for name in TRAINED for turn in results[name]["turns"]]
    assert len({turn["rows_sha256"] for turn in turns}) == 1
    assert len({turn["trained"] for turn in turns}) == 1
    assert loss_difference(results, "plain") == 0.0  # every turn begins where the first one did
    eager, tutorial = loss_difference(results, "eager"), loss_difference(results, "plain_tutorial")
    assert eager is not None
    assert tutorial is not None
    assert eager < 1e-4
    assert tutorial < 0.005
    assert abs(turns[0]["losses"][0] - turns[0]["losses"][-1]) > 0.0  # and it does train
    built = {name: (results[name]["facts"]["embeddings"], results[name]["facts"]["head"]) for name in TRAINED}
    assert built["plain"] == built["eager"] == ("torch.bfloat16", "torch.bfloat16")
    assert built["plain_tutorial"] == ("torch.float32", "torch.float32")
    assert {results[name]["facts"]["adapters"] for name in TRAINED} == {"torch.float32"}


@pytest.mark.nightly
def test_a_contender_that_fails_is_recorded_and_the_others_go_on(stored: dict[str, Any]) -> None:
    graph = stored["cells"]["2x32p"]["graph"]
    assert graph["outcome"] == "failed"
    assert "Traceback" in graph["traceback"]
    assert "graph: failed" in (stored["folder"] / "peers_qlora_tiny.md").read_text(encoding="utf-8")


@pytest.mark.nightly
def test_the_page_is_made_again_from_the_file(stored: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    page = stored["folder"] / "peers_qlora_tiny.md"
    before = page.read_text(encoding="utf-8")
    assert "(a test)" in before
    page.unlink()
    main(["table", str(stored["folder"] / "peers_qlora_tiny.json")])
    assert page.read_text(encoding="utf-8") == before
    assert "| 2x32p | eager |" in capsys.readouterr().out


@pytest.mark.nightly
def test_cells_that_are_done_can_be_left_out_and_late_ones_do_not_begin(
    stored: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [str(stored["folder"]), "--model", "tiny", "--contenders", "plain", "--device", "cpu"]
    main([*asked, "--cells", "2x32p", "--resume"])
    assert "| 2x32p | eager |" in capsys.readouterr().out
    main([*asked, "--cells", "1x32", "--budget-seconds", "0"])
    assert "1x32 is left out" in capsys.readouterr().out


@pytest.mark.nightly
def test_files_of_several_calls_are_joined(stored: dict[str, Any], tmp_path: Path) -> None:
    first = read(stored["folder"] / "peers_qlora_tiny.json")
    second = {**first, "cells": {"1x32": first["cells"]["2x32p"]}, "origins": {"1x32": first["origins"]["2x32p"]}}
    (tmp_path / "second.json").write_text(json.dumps({"origin": {}, **second}), encoding="utf-8")
    main(["join", str(tmp_path), str(stored["folder"] / "peers_qlora_tiny.json"), str(tmp_path / "second.json")])
    assert list(read(tmp_path / "peers_qlora_tiny.json")["cells"]) == ["2x32p", "1x32"]
    with pytest.raises(SystemExit, match="stay apart"):
        joined([first, {**second, "model": "llama3_1_8b"}])


def test_files_of_before_are_read_with_the_names_of_today(tmp_path: Path) -> None:
    for name in ("peers_qlora.json", "peers_qlora_5155656.json"):
        copy = tmp_path / name
        copy.write_bytes((RESULTS / "h100" / name).read_bytes())
        assert "plain_tutorial" in write_page(copy)
        assert copy.read_bytes() == (RESULTS / "h100" / name).read_bytes()
    cells = read(RESULTS / "h100/peers_qlora.json")["cells"]
    assert list(cells["2x2048c"]) == ["plain_tutorial", "unsloth", "graph"]  # nothing of it is plain as it is now
    assert list(cells["2x2048"]) == ["plain_tutorial", "unsloth_no_checkpointing", "graph"]
    assert "plain" in read(RESULTS / "h100/peers_lora.json")["cells"]["2x2048"]  # it never raised anything


def test_a_process_that_dies_or_is_silent_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup("plain", Cell.parse("1x32"), "lora", str(tmp_path))
    for script, outcome in (("exit 7", "killed"), ("sleep 60", "timed_out")):
        interpreter = tmp_path / "python"
        interpreter.write_text(f"#!/bin/sh\n{script.replace('sleep', 'exec sleep')}\n")
        interpreter.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(interpreter))
        contender = Contender(setup, tmp_path, CPU)
        answer = contender.loaded(0.5 if outcome == "timed_out" else 30)
        assert answer["outcome"] == outcome
        assert answer["phase"] == "load"
        if outcome == "timed_out":
            os.kill(contender._process.pid, 9)
        contender.stop()


def test_running_out_of_memory_is_distinguished_from_other_errors() -> None:
    def too_much() -> dict[str, Any]:
        raise RuntimeError("CUDA error: out of memory")

    assert answered(too_much)["outcome"] == "out_of_memory"
    assert answered(lambda: {"x": 1 // 0})["reason"].startswith("ZeroDivisionError")
    assert answered(lambda: {"x": 1}) == {"outcome": "finished", "x": 1}


def test_the_message_for_a_mistyped_cell_shows_what_one_looks_like(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["nowhere", "--cells", "1x32,1x51c2"])
    assert "'1x51c2' is not a cell; one looks like 2x2048" in capsys.readouterr().err


def test_cells() -> None:
    cell = Cell.parse("2x2048c")
    assert (cell.batch_size, cell.seq_len, cell.checkpointing, cell.packed) == (2, 2048, True, False)
    assert Cell.parse("2x2048p").packed
    assert [str(Cell.parse(text)) for text in plan.CELLS] == list(plan.CELLS)
    for wrong in ("2", "0x512", "2x2048d", "2x2048pc"):
        with pytest.raises(ValueError, match="is not a cell"):
            Cell.parse(wrong)


def test_what_differs_in_a_cell() -> None:
    assert applies("unsloth", Cell.parse("1x512"), "qlora")
    assert applies("unsloth_no_checkpointing", Cell.parse("1x512"), "qlora")
    assert not applies("unsloth_no_checkpointing", Cell.parse("1x512c"), "qlora")
    assert not applies("plain_tutorial", Cell.parse("1x512"), "lora")  # nothing is raised there
    assert missing_packages("plain", "lora") == []


@pytest.mark.parametrize("count", [2, 5, 6])
def test_places_and_predecessors_are_balanced(count: int) -> None:
    rounds = [order(range(count), number) for number in range(count if count % 2 == 0 else 2 * count)]
    for place in zip(*rounds, strict=True):
        assert {place.count(name) for name in range(count)} == {len(rounds) // count}
    followed = Counter(pair for each in rounds for pair in pairwise(each))
    assert len(followed) == count * (count - 1)
    assert len(set(followed.values())) == 1


def test_a_window_is_enough_after_its_seconds_or_after_many_steps() -> None:
    turn = Turn(warmup=2, least=4, seconds=5.0, compared=6, profiled=3)
    assert not turn.enough(3, 60.0)
    assert turn.enough(4, 5.0)
    assert not turn.enough(29, 4.9)
    assert not turn.enough(30, 1.9)  # too short for the energy counter
    assert turn.enough(30, 2.0)
    assert turn.enough(400, 0.1)


def test_packed_rows_hold_whole_documents_of_many_lengths_and_are_the_same_every_time() -> None:
    rows = rows_of(Cell.parse("4x2048p"), 12, 1000)
    assert [row.ids for row in rows] == [row.ids for row in rows_of(Cell.parse("4x2048p"), 12, 1000)]
    lengths = [length for row in rows for length in row.document_lengths]
    assert min(lengths) >= 4
    assert max(lengths) <= 2048
    assert 200 < statistics.median(lengths) < 400
    assert 0.9 * 12 * 2048 < sum(lengths) <= 12 * 2048
    assert [len(row.ids) for row in rows_of(Cell.parse("4x64"), 3, 1000)] == [64, 64, 64]


def test_a_batch_without_padding_has_each_document_begin_at_position_0() -> None:
    rows = rows_of(Cell.parse("2x256p"), 2, 1000)
    batch = end_to_end(rows)
    lengths = batch["packed_seq_lengths"].tolist()
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (1, sum(lengths))
    begins = [0, *accumulate(lengths)][:-1]
    assert [i for i, position in enumerate(batch["position_ids"][0].tolist()) if position == 0] == begins
    assert [i for i, label in enumerate(batch["labels"][0].tolist()) if label == -100] == begins


def test_energy_is_absent_with_a_reason_where_the_counter_is_too_coarse() -> None:
    assert energy(100.0, 600.0, 2.5, 1000) == {"joules_per_token": 0.5, "energy_resolution_percent": 4.0}
    assert "less than 2 s" in energy(100.0, 600.0, 1.5, 1000)["energy_absent"]
    assert "no counter" in energy(None, None, 2.5, 1000)["energy_absent"]


def _turn(number: int, speed: float, losses: list[float], rows: str = "a") -> dict[str, Any]:
    figures = {"tokens_per_second": speed, "step_seconds_median": 512 / speed, "first_step_seconds": 1.0}
    return {"round": number, **figures, "losses": losses, "rows_sha256": rows, "trained": 5}


def test_ratios_are_within_a_round_and_losses_of_other_rows_are_not_compared() -> None:
    plain = {"outcome": "finished", "turns": [_turn(0, 100, [2.0, 1.0]), _turn(1, 200, [2.0, 1.0])]}
    fast = {"outcome": "finished", "turns": [_turn(0, 300, [2.0, 1.25]), _turn(1, 400, [2.0, 1.0])]}
    odd = {"outcome": "finished", "turns": [_turn(1, 100, [2.0, 1.0], rows="b")]}
    results: dict[str, dict[str, Any]] = {"plain": plain, "fast": fast, "odd": odd}
    assert ratios(results, "fast", "plain") == [3.0, 2.0]
    assert ratios(results, "odd", "plain") == [0.5]
    assert loss_difference(results, "fast") == 0.25
    assert loss_difference(results, "odd") is None
    text = table({"1x512": results})
    assert "| 1x512 | fast | 2 | 350 (300..400) | 2.50 (2.00..3.00) |" in text
    assert "NOT ALL CONTENDERS SAW THE SAME ROWS" in text


def test_a_compilation_pays_after_some_steps() -> None:
    """By hand: 10 s later, gains 0.5 s per step from the second on, so it is level at step 21."""
    slow = {"turns": [{"first_step_seconds": 1.0, "step_seconds_median": 1.0}]}
    fast = {"turns": [{"first_step_seconds": 11.0, "step_seconds_median": 0.5}]}
    results: dict[str, dict[str, Any]] = {"plain": slow, "graph": fast}
    assert ahead_after(results, "graph", "plain") == "21 steps"
    assert ahead_after(results, "plain", "graph") == "-"
    assert ahead_after(results, "plain", "plain") == "-"
    fast["turns"][0]["step_seconds_median"] = 2.0
    assert ahead_after(results, "graph", "plain") == "never"


def test_what_ran_out_of_memory_next_to_others_is_shown_alone() -> None:
    lost = {"outcome": "out_of_memory", "reason": "3 GiB", "round": 0, "turns": []}
    fits = {"outcome": "finished", "tokens_per_second": 1234.0, "peak_allocated_gib": 70.0}
    text = table({"1x512": {"plain": {**lost, "alone": fits}, "eager": {**lost, "alone": lost}}})
    assert "plain: out_of_memory in round 1, 3 GiB. Alone on the card it ran: 1,234 tokens/s at 70.0 GiB" in text
    assert "eager: out_of_memory in round 1, 3 GiB. Alone on the card: out_of_memory, 3 GiB" in text


@pytest.mark.parametrize("most", [100, 2_972, 5_000, 6_144, 9_000, 127_000, 200_000])
def test_longest_row_is_found_within_a_twentieth(most: int) -> None:
    looking = Search(8)
    while (length := looking.next()) is not None:
        looking.note(length, length <= most)
    assert looking.attempts <= 6
    assert looking.fits <= most
    if 2_972 <= most <= 9_000:
        assert looking.fits * 1.11 > most
