"""What many trials will take together, from what is known of each."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from planted_rates import UUID, plant_rates
from tiny_trials import tiny_config

from lora_lab.events import DataCounted, ModelCounted
from lora_lab.forecast.display import in_one_line
from lora_lab.forecast.estimate import Range
from lora_lab.forecast.total import ALIKE, EARLIER, RATES, Asked, total
from lora_lab.matmul_cache import known_rate
from lora_lab.memory_cache import known_bytes
from lora_lab.options import DType
from lora_lab.store.record import params
from lora_lab.store.trials import Trial
from lora_lab.telemetry.nvml import Card
from lora_lab.work import MicroBatch, ModelFacts, Workload


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.usefixtures("empty_cache")
def test_rates_of_another_card_or_torch_are_not_known() -> None:
    plant_rates(1e14, 1e12, torch="1.0.0")
    torch = version("torch")
    assert known_rate(f"GPU-{UUID}", torch, "bfloat16") is None
    assert known_bytes(f"GPU-{UUID}", torch) is None
    plant_rates(2e14, 2e12)
    assert known_rate(f"GPU-{UUID}", torch, "bfloat16") == 2e14
    assert known_bytes(f"GPU-{UUID}", torch) == 2e12
    assert known_rate(f"GPU-1{UUID[1:]}", torch, "bfloat16") is None
    assert known_rate(f"GPU-{UUID}", torch, "float16") is None


class FakeCard(Card):
    """A card that may draw 300 W."""

    def limit_watts(self) -> float | None:
        return 300.0


CARD = FakeCard(index=0, uuid="GPU-0", name="Fake Card 0", total_bytes=2**33, compute_capability=(8, 6), driver="1")


def earlier(seconds: float, **metrics: float) -> dict[str, Any]:
    return {"seconds": seconds, "metrics": metrics}


WORK = Workload(
    model=ModelFacts(
        counted=ModelCounted(
            t=0.0,
            frozen=10**6,
            frozen_in_layers=10**6,
            trainable=10**4,
            attention_width=64,
            weight_bytes=0,
            weight_elements=10**6,
            layers=2,
        ),
        layers=2,
        linears=14,
        widths=2000,
        matrices=28,
        hidden=32,
        vocabulary=256,
    ),
    data=DataCounted(
        t=0.0,
        rows_read=8,
        rows_train=8,
        rows_heldout=0,
        rows_truncated=0,
        rows_without_labels=0,
        real=128,
        trained=128,
        digest="",
    ),
    epoch=[MicroBatch(2, 16, 32, 32, 512)] * 4,
    steps=4,
    steps_per_epoch=4,
    epoch_in_full_steps=4.0,
    evaluations=0,
    checkpoints=0,
    heldout=[],
    general=[],
    answers=0,
)


def asked(
    count: int,
    *trials: dict[str, Any],
    card: Card | None = CARD,
    work: Workload | None = None,
    others: Sequence[Trial] = (),
) -> Asked:
    return Asked(config=tiny_config(), count=count, card=card, earlier=trials, others=others, work=work)


def test_times_of_points_and_their_repeats_are_added_and_so_are_their_ends() -> None:
    one, both = total([asked(1, earlier(60.0))]), total([asked(3, earlier(60.0)), asked(1, earlier(60.0))])
    assert both.seconds.value == pytest.approx(240)
    for end in ("low", "high"):
        assert getattr(both.seconds, end) == pytest.approx(4 * getattr(one.seconds, end)), "they err together"
    assert one.seconds.low < 60 < one.seconds.high
    assert both.points == {EARLIER: 2}


def test_more_earlier_trials_make_the_interval_narrower_and_their_median_counts() -> None:
    one, three = total([asked(1, earlier(60.0))]), total([asked(1, *map(earlier, (59.0, 60.0, 600.0)))])
    assert three.seconds.value == 60
    assert three.seconds.high < one.seconds.high


def test_the_wait_of_an_earlier_trial_for_its_device_is_not_expected_again() -> None:
    waited = earlier(3660.0, **{"time/waiting_seconds": 3600.0, "energy/mean_power_watts": 200.0})
    found = total([asked(1, waited)])
    assert found.seconds.value == 60
    assert found.kwh.value * 3.6e6 <= 60 * 200.0


def test_a_small_amount_is_never_said_to_be_nothing() -> None:
    """A short trial takes a fraction of a watt-hour."""
    watched = earlier(6.0, **{"energy/mean_power_watts": 200.0, "time/window_seconds": 6.0})
    said = re.search(r"([\d.]+) kWh \(([\d.]+) to ([\d.]+)\)", in_one_line(total([asked(1, watched)])))
    assert said
    value, low, high = map(float, said.groups())
    assert value == pytest.approx(6 * 200 / 3.6e6, rel=0.05)
    assert 0 < low < value < high


def test_the_energy_is_that_of_training_and_of_waiting() -> None:
    watched = earlier(
        100.0, **{"energy/mean_power_watts": 200.0, "time/window_seconds": 50.0, "time/warm_up_seconds": 10.0}
    )
    found = total([asked(2, watched)])
    least, most = 2 * 60 * 200.0, 2 * 100 * 200.0
    assert least < found.kwh.value * 3.6e6 < most
    assert found.without_energy == 0
    assert total([asked(2, earlier(100.0))]).without_energy == 1


@pytest.mark.usefixtures("empty_cache")
def test_trials_of_the_same_settings_scale_what_the_rates_say() -> None:
    """A trial whose steps took ten times as long as the rates say makes the forecast longer."""
    plant_rates(1e14, 1e12)
    card = replace(CARD, uuid=f"GPU-{UUID}")
    config = tiny_config()
    config = replace(config, precision=replace(config.precision, dtype=DType.bf16))
    by_rates = total([replace(asked(1, card=card, work=WORK), config=config)])
    steps = {"throughput/steps_per_second": 0.01, "throughput/slots_per_second": 0.01 * 2 * 16}
    slow = Trial(
        run_id="",
        name="",
        sweep=None,
        outcome="finished",
        params=params(config, {}),
        metrics=steps,
        tags={"device": card.name},
        started_ms=0,
    )
    by_trial = total([replace(asked(1, card=card, work=WORK, others=[slow]), config=config)])
    assert (by_rates.points, by_trial.points) == ({RATES: 1}, {ALIKE: 1})
    assert by_trial.seconds.value > WORK.steps * 100 > by_rates.seconds.value
    elsewhere = replace(slow, tags={"device": "another card"})
    other = total([replace(asked(1, card=card, work=WORK, others=[elsewhere]), config=config)])
    assert other.points == {RATES: 1}


@pytest.mark.parametrize("card", [None, CARD])
def test_what_is_not_known_is_not_in_the_sum(
    card: Card | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = total([asked(1, card=card)])
    assert found.seconds == Range(0.0, 0.0, 0.0)
    assert sum(found.unknown.values()) == 1
    assert not found.points
    assert math.isfinite(found.kwh.value)
    assert RATES not in found.points
