import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import plan
from benchmarks.peers.__main__ import main
from benchmarks.peers.contender import answered
from benchmarks.peers.controller import window_steps
from benchmarks.peers.plan import Cell, Setup, Turn, missing_packages
from benchmarks.peers.processes import Contender
from benchmarks.peers.table import loss_difference, ratios, table
from benchmarks.peers.turn import energy

CPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A dry run: two stacks that train, one that can't (a CUDA graph on a CPU), one whose package is not there."""
    out = tmp_path_factory.mktemp("peers")
    line = "--model tiny --cells 1x32 --contenders plain,eager,graph,unsloth --rounds 2 --steps 2 --warmup 1"
    main([str(out), *line.split(), "--window-seconds", "0", "--device", "cpu"])
    found: dict[str, Any] = json.loads((out / "peers_qlora.json").read_text(encoding="utf-8"))
    found["folder"] = out
    return found


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is not None, reason="Unsloth is installed")
def test_a_missing_package_is_named(stored: dict[str, Any]) -> None:
    unsloth = stored["cells"]["1x32"]["unsloth"]
    assert unsloth["outcome"] == "missing_package"
    assert "unsloth_zoo" in unsloth["reason"]
    assert unsloth["turns"] == []


def test_every_round_has_a_turn_of_each(stored: dict[str, Any]) -> None:
    for name in ("plain", "eager"):
        result = stored["cells"]["1x32"][name]
        assert result["outcome"] == "finished", result
        assert [turn["round"] for turn in result["turns"]] == [0, 1]
        for turn in result["turns"]:
            assert turn["tokens_per_second"] == pytest.approx(turn["steps"] * 32 / turn["window_seconds"])
            assert len(turn["step_seconds"]) == turn["steps"] == 2
            assert "peak_allocated_gib" not in turn  # no card


def test_losses_are_the_same_in_every_stack(stored: dict[str, Any]) -> None:
    results = stored["cells"]["1x32"]
    turns = [turn for name in ("plain", "eager") for turn in results[name]["turns"]]
    assert len({turn["rows_sha256"] for turn in turns}) == 1
    assert len({turn["trained"] for turn in turns}) == 1
    assert loss_difference(results, "plain") == 0.0  # every turn begins where the first one did
    difference = loss_difference(results, "eager")
    assert difference is not None
    assert difference < 0.005  # plain raises embeddings and norms to fp32, lora_lab does not
    assert abs(turns[0]["losses"][0] - turns[0]["losses"][-1]) > 0.0  # and it does train


def test_a_contender_that_fails_is_recorded_and_the_others_go_on(stored: dict[str, Any]) -> None:
    graph = stored["cells"]["1x32"]["graph"]
    assert graph["outcome"] == "failed"
    assert "Traceback" in graph["traceback"]
    assert "graph: failed" in (stored["folder"] / "peers_qlora.md").read_text(encoding="utf-8")


def test_the_table_is_made_again_from_the_file(stored: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    page = stored["folder"] / "peers_qlora.md"
    before = page.read_text(encoding="utf-8")
    page.unlink()
    main(["table", str(stored["folder"] / "peers_qlora.json")])
    assert page.read_text(encoding="utf-8") == before
    assert "| 1x32 | eager |" in capsys.readouterr().out


def test_cells_of_a_second_call_join_the_file_and_done_ones_can_be_left_out(
    stored: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(stored["folder"])
    main([out, "--model", "tiny", "--cells", "1x32", "--contenders", "plain", "--device", "cpu", "--resume"])
    assert "| 1x32 | eager |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is of model tiny"):
        main([out, "--cells", "1x32", "--device", "cpu"])


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


def test_running_out_of_memory_is_told_from_other_errors() -> None:
    def too_much() -> dict[str, Any]:
        raise RuntimeError("CUDA error: out of memory")

    assert answered(too_much)["outcome"] == "out_of_memory"
    assert answered(lambda: {"x": 1 // 0})["reason"].startswith("ZeroDivisionError")
    assert answered(lambda: {"x": 1}) == {"outcome": "finished", "x": 1}


def test_a_mistyped_cell_is_told_what_one_looks_like(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["nowhere", "--cells", "1x32,1x51c2"])
    assert "'1x51c2' is no cell; one looks like 2x2048" in capsys.readouterr().err


def test_cells() -> None:
    cell = Cell.parse("2x2048c")
    assert (cell.batch_size, cell.seq_len, cell.checkpointing, cell.tokens) == (2, 2048, True, 4096)
    assert [str(Cell.parse(text)) for text in plan.CELLS] == list(plan.CELLS)
    for wrong in ("2", "0x512", "2x2048d"):
        with pytest.raises(ValueError, match="is no cell"):
            Cell.parse(wrong)


def test_what_a_method_needs() -> None:
    assert missing_packages("plain", "lora") == []
    assert Turn(warmup=3, steps=8, compared=11, profiled=True).total == 12


def test_windows_become_long_enough_for_the_energy_counter() -> None:
    assert window_steps([], 8, 2.5) == 8
    assert window_steps([{"step_seconds_median": 0.025}], 8, 2.5) == 100
    assert window_steps([{"step_seconds_median": 0.6}], 8, 2.5) == 8
    assert window_steps([{"step_seconds_median": 0.0001}], 8, 2.5) == 400


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
    assert "| 1x512 | fast | 350 (300..400) | 2.50 (2.00..3.00) |" in text
    assert "NOT ALL CONTENDERS SAW THE SAME ROWS" in text


def test_what_ran_out_of_memory_beside_others_is_told_alone() -> None:
    lost = {"outcome": "out_of_memory", "reason": "3 GiB", "round": 0, "turns": []}
    fits = {"outcome": "finished", "tokens_per_second": 1234.0, "peak_allocated_gib": 70.0}
    text = table({"1x512": {"plain": {**lost, "alone": fits}, "eager": {**lost, "alone": lost}}})
    assert "plain: out_of_memory in round 1, 3 GiB. Alone on the card it ran: 1,234 tokens/s at 70.0 GiB" in text
    assert "eager: out_of_memory in round 1, 3 GiB. Alone on the card: out_of_memory, 3 GiB" in text
