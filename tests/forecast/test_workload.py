"""The work of a trial is counted from its own rows, and its model on the meta device."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import lab_in
from tiny_trials import tiny_config

from lora_lab.composition.once import compose_once
from lora_lab.events import MatmulRate
from lora_lab.forecast import __main__ as command
from lora_lab.forecast import ask
from lora_lab.machine import cpu_name
from lora_lab.memory_cache import load_bytes, store_bytes
from lora_lab.options import Batching
from lora_lab.store.record import params
from lora_lab.store.trials import Trial
from lora_lab.work import DeviceRates
from lora_lab.worker.memory_rate import known_rates, measured_rates
from lora_lab.worker.workload import workload

ROWS = [{"instruction": "q" * 20, "output": "a" * length} for length in range(1, 41)]


def test_a_window_has_its_own_steps_and_no_evaluation_between_them() -> None:
    config = tiny_config()
    found = workload(replace(config, data=replace(config.data, rows=20)))
    assert (found.steps, found.evaluations, found.checkpoints, found.answers) == (4, 0, 0, 0)
    assert len(found.epoch) == found.steps_per_epoch == 5
    assert {(batch.rows, batch.width, batch.real, batch.attended) for batch in found.epoch} == {(2, 16, 32, 512)}
    assert [batch.rows for batch in found.heldout] == [2]
    counted = found.model.counted
    assert counted is not None
    assert found.model.matrices == 2 * found.model.linears
    # A and B of a layer have rank x (inputs + outputs) weights
    assert counted.trainable == config.method.rank * found.model.widths


def test_a_jobs_evaluations_and_checkpoints_are_those_of_its_plan() -> None:
    config = tiny_config()
    data = replace(config.data, rows=40)
    train = replace(config.train, epochs=3, eval_every=0.5, checkpoint_every=1.0)
    found = workload(replace(config, data=data, train=train, batch_size=1, grad_accum_steps=2))
    assert (found.steps, found.steps_per_epoch) == (30, 10)
    assert (found.evaluations, found.checkpoints) == (6, 3)


def test_a_last_step_of_fewer_micro_batches_is_no_full_step() -> None:
    """Five micro-batches in steps of four: an epoch has two steps, and the work of one and a quarter."""
    config = tiny_config()
    job = replace(config, data=replace(config.data, rows=10), train=replace(config.train, epochs=3), batch_size=1)
    found = workload(replace(job, grad_accum_steps=4))
    assert (found.steps, found.steps_per_epoch, found.epoch_in_full_steps) == (6, 2, 1.25)


def test_rows_are_counted_as_they_are_laid_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Packed rows have no padding but their ends, and as many real tokens."""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    monkeypatch.chdir(tmp_path)
    config = tiny_config()
    data = replace(config.data, source=type(config.data.source).file, path="rows.jsonl", rows=None)
    padded = workload(replace(config, data=data, seq_len=256, batch_size=4))
    packed = workload(
        replace(config, data=replace(data, batching=Batching.packed), seq_len=256, batch_size=1, grad_accum_steps=1)
    )
    real = sum(batch.real for batch in packed.epoch)
    assert real == packed.data.real
    assert real - 4 * 256 < sum(batch.real for batch in padded.epoch) <= real, "less than a batch is left out"
    assert all(batch.width == 256 for batch in packed.epoch)
    assert all(batch.real < batch.slots for batch in padded.epoch)
    assert all(batch.attended < batch.width**2 for batch in packed.epoch), "attention stays within a document"


def test_rates_are_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lora_lab.worker import memory_rate

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(memory_rate, "TOTAL_SECONDS", 0.01)
    monkeypatch.setattr(memory_rate, "_CPU_BYTES", 2**22)
    monkeypatch.setattr(
        memory_rate,
        "measure_matmul_rate",
        lambda *_: MatmulRate(t=0.0, dtype="float32", size=256, flops_per_second=1e10),
    )
    config = tiny_config()
    assert known_rates(config) is None
    found = measured_rates(config)
    assert 1e7 < found.bytes_per_second < 1e13
    monkeypatch.setattr(memory_rate, "measure_memory_rate", lambda _: pytest.fail("measured again"))
    again = known_rates(config)
    assert again is not None
    assert again.bytes_per_second == found.bytes_per_second == measured_rates(config).bytes_per_second


def test_a_damaged_cache_is_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lora_lab.matmul_cache import RateKey

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    key = RateKey(device="GPU-1", cuda="", torch="2", dtype="uint8")
    store_bytes(key, 3e12)
    assert load_bytes(key) == 3e12
    assert load_bytes(replace(key, device="GPU-2")) is None
    [file] = (tmp_path / "lora_lab").iterdir()
    file.write_text(file.read_text().replace("3000000000000.0", "-1.0"))
    assert load_bytes(key) is None


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command looks at rows in this process, and at a CPU of known rates, in an empty folder."""

    def look(config: object, placement: object, waiting: object) -> tuple[object, DeviceRates | None]:
        rates = DeviceRates(MatmulRate(t=0.0, dtype="float32", size=512, flops_per_second=1e11), 1e10)
        return workload(config), rates if waiting else None  # type: ignore[arg-type]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lora-lab"])
    monkeypatch.setattr(ask, "look", look)


TINY = ["model=tiny", "data=random_tokens", "seq_len=32", "train.epochs=1", "data.rows=40", "device=cpu"]


@pytest.mark.usefixtures("in_process")
def test_the_command_answers_for_this_cpu_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*TINY, "--rent", "1/h", "--price", "0.3"]) == 0
    said = capsys.readouterr().out
    first = said.splitlines()[0]
    assert first.startswith("about ")
    assert "energy not known" in first
    assert "rented" in first
    assert "CPU" in said
    assert "--card" in said


@pytest.mark.usefixtures("in_process")
def test_the_command_answers_for_a_card_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*TINY, "--card", "rtx4090", "--price", "0.3/kWh"]) == 0
    said = capsys.readouterr().out
    assert "electricity" in said.splitlines()[0]
    assert "twice as wide" in said
    assert command.main([*TINY, "--card", "h100", "--probe"]) == 2
    assert command.main([*TINY, "--rent", "cheap"]) == 2
    assert command.main([*TINY, "train.eval_every=0"]) == 2


@pytest.mark.usefixtures("in_process")
def test_a_finished_trial_comes_before_the_rates_and_a_probe_before_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Both measured steps of a fixed time, of which the forecast's steps take their time."""

    def measured(step_seconds: float, folder: Path) -> Trial:
        config = compose_once(TINY)
        slots = config.batch_size * config.seq_len
        return Trial(
            run_id=str(step_seconds),
            name="",
            sweep=None,
            outcome="finished",
            params=params(config, {}),
            metrics={
                "throughput/steps_per_second": 1 / step_seconds,
                "throughput/slots_per_second": slots / step_seconds,
            },
            tags={"device": "cpu (x)", "device.cpu": cpu_name(), "folder": str(folder)},
            started_ms=0,
        )

    own, probed = measured(7.0, tmp_path / "own"), measured(3.0, tmp_path / "probe")
    monkeypatch.setattr(ask, "_trials", lambda: [own])
    assert command.main(TINY) == 0
    said = capsys.readouterr().out
    assert "a finished trial" in said
    assert "7 s a step" in said
    monkeypatch.setattr(ask, "_trials", lambda: [own, probed])
    monkeypatch.setattr(command, "probe", lambda *_: tmp_path / "probe")
    assert command.main([*TINY, "--probe"]) == 0
    said = capsys.readouterr().out
    assert "a probe" in said
    assert "3 s a step" in said


@pytest.mark.nightly
def test_a_probe_is_a_trial_that_the_next_forecast_finds(tmp_path: Path) -> None:
    forecast = lab_in(tmp_path, "lora_lab.forecast")
    first = forecast(*TINY, "tracking=none", "--probe")
    assert first.code == 0, first.text
    assert "a probe on this machine" in first.out
    assert len(list((tmp_path / "multirun").glob("*/*/record.json"))) >= 1
    assert "a finished trial of these settings" in forecast(*TINY).out
