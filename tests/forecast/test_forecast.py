"""A forecast adds up what a trial will do, scales with what was measured, and says what it does not know."""

import math
from dataclasses import replace

import pytest
from tiny_trials import tiny_config

from lora_lab.config import InvalidInput, TrialConfig
from lora_lab.events import DataCounted, ModelCounted
from lora_lab.forecast.advice import advice
from lora_lab.forecast.cards import CARDS, card_named
from lora_lab.forecast.display import headline
from lora_lab.forecast.estimate import Forecast, Range, forecast, mean_step, operations
from lora_lab.forecast.fitted import constants
from lora_lab.forecast.money import Prices, electricity, hours_to_own, read_price, rented
from lora_lab.forecast.probe import steps_of
from lora_lab.forecast.roofline import Roofline, Speeds, StepTime
from lora_lab.forecast.sources import Source, of_rates, of_trials, same_settings
from lora_lab.options import Checkpointing, EngineKind, Quantization
from lora_lab.store.record import params
from lora_lab.store.trials import Trial
from lora_lab.work import MicroBatch, ModelFacts, Workload

H100 = Speeds(790e12, 3e12)
QWEN = ModelFacts(
    counted=ModelCounted(
        t=0.0,
        frozen=1_543_000_000,
        frozen_in_layers=1_310_000_000,
        trainable=18_500_000,
        attention_width=28 * 1536,
        weight_bytes=0,
        weight_elements=1_544_000_000,
        layers=28,
    ),
    layers=28,
    linears=196,
    widths=28 * 45_000,
    matrices=392,
    hidden=1536,
    vocabulary=151_936,
)
DEVICE = "NVIDIA H100 80GB HBM3"


def batch(rows: int = 1, width: int = 512) -> MicroBatch:
    return MicroBatch(rows, width, rows * width, rows * width, rows * width**2)


def asked(engine: EngineKind = EngineKind.eager, **changes: object) -> TrialConfig:
    config = tiny_config(quantization=Quantization.nf4)
    kind = replace(config.engine, kind=engine, chunked_loss=engine is not EngineKind.eager)
    bf16 = replace(config.precision, dtype=type(config.precision.dtype).bf16)
    return replace(config, engine=kind, precision=bf16, **changes)


def roofline(config: TrialConfig, speeds: Speeds = H100) -> Roofline:
    return Roofline(config, QWEN, speeds, constants().constants)


def work(steps: int = 100, heldout: int = 0, epoch: list[MicroBatch] | None = None) -> Workload:
    counted = DataCounted(
        t=0.0, rows_read=1000, rows_train=100, rows_heldout=10, rows_truncated=0, rows_without_labels=0, real=51_200,
        trained=20_000, digest="", length_median=300, length_p95=320,
    )  # fmt: skip
    return Workload(
        model=QWEN,
        data=counted,
        epoch=epoch or [batch()] * 50,
        steps=steps,
        steps_per_epoch=50,
        epoch_in_full_steps=50.0,
        evaluations=2 if heldout else 0,
        checkpoints=2,
        heldout=[batch()] * heldout,
        general=[],
        answers=0,
    )


def made(config: TrialConfig, load: Workload, scale: float = 1.0, watts: float | None = None) -> Forecast:
    source = Source("a test", scale, 0.1, watts)
    return forecast(config, load, roofline(config), source, constants().power, 700.0)


def trial(config: TrialConfig, step_seconds: float, slots: int, watts: float | None = None) -> Trial:
    metrics = {"throughput/steps_per_second": 1 / step_seconds, "throughput/slots_per_second": slots / step_seconds}
    return Trial(
        run_id="1",
        name="",
        sweep=None,
        outcome="finished",
        params=params(config, {}),
        metrics=metrics | ({} if watts is None else {"energy/mean_power_watts": watts}),
        tags={"device": DEVICE},
        started_ms=0,
    )


def test_small_steps_wait_for_the_host_and_large_ones_for_the_card() -> None:
    small = roofline(asked()).step([batch(1, 512)])
    large = roofline(asked()).step([batch(16, 4096)])
    assert small.host > small.card
    assert large.card > large.host
    assert small.seconds == pytest.approx(small.host, rel=0.1)
    assert large.card < large.seconds < large.card + large.host + large.waiting


def test_the_card_works_longer_for_checkpointing_longer_rows_and_a_slower_card() -> None:
    plain = roofline(asked()).step([batch(4, 2048)])
    again = roofline(asked(gradient_checkpointing=Checkpointing.full)).step([batch(4, 2048)])
    half = roofline(asked(gradient_checkpointing=Checkpointing.selective)).step([batch(4, 2048)])
    slower = roofline(asked(), Speeds(H100.flops_per_second / 4, H100.bytes_per_second / 4)).step([batch(4, 2048)])
    assert plain.card < half.card < again.card < 1.6 * plain.card
    assert 3 < slower.card / plain.card < 4, "the least time of a product does not depend on the rates"
    assert slower.host == plain.host


def test_layers_in_host_memory_take_the_time_of_their_passes_over_pcie() -> None:
    def seconds(layers: int | str, checkpointing: Checkpointing = Checkpointing.none) -> float:
        config = asked(EngineKind.graph, gradient_checkpointing=checkpointing)
        engine = replace(config.engine, host_layers=layers)
        return roofline(replace(config, engine=engine)).step([batch()]).card

    counted = QWEN.counted
    assert counted is not None
    pass_seconds = counted.frozen_in_layers / 2 / 40e9
    assert seconds("all") - seconds(0) == pytest.approx(2 * pass_seconds)
    assert seconds(QWEN.layers // 2) - seconds(0) == pytest.approx(pass_seconds)
    again = Checkpointing.full
    assert seconds("all", again) - seconds(0, again) == pytest.approx(3 * pass_seconds)


def test_graph_takes_what_was_measured_of_it_on_an_h100() -> None:
    """Qwen2.5-1.5B at 1x512 under engine=graph took 0.0165 to 0.0216 s a step, eager 0.22 to 0.32."""
    assert 0.0145 < roofline(asked(EngineKind.graph)).step([batch()]).seconds < 0.022
    assert 0.22 < roofline(asked()).step([batch()]).seconds < 0.38


def test_accumulation_adds_micro_batches_and_waits_for_one_optimizer() -> None:
    one = roofline(asked()).step([batch()])
    four = roofline(asked()).step([batch()] * 4)
    assert (four.card, four.host) == (pytest.approx(4 * one.card), pytest.approx(4 * one.host))
    assert four.waiting == one.waiting
    mean = mean_step(asked(grad_accum_steps=4), work(), roofline(asked()))
    assert mean.card == pytest.approx(four.card)


def test_the_mean_step_weighs_widths_by_their_number() -> None:
    mixed = work(epoch=[batch(1, 512)] * 3 + [batch(1, 2048)])
    line = roofline(asked())
    expected = (3 * line.step([batch(1, 512)]).card + line.step([batch(1, 2048)]).card) / 4
    assert mean_step(asked(), mixed, line).card == pytest.approx(expected)


def test_parts_add_up_and_the_interval_is_around_the_sum() -> None:
    found = made(asked(EngineKind.graph), work(heldout=3))
    assert {part.name for part in found.parts} == {
        *("start and loading", "compiling for 1 row lengths", "100 steps", "4 evaluations", "2 checkpoints")
    }
    total = sum(part.seconds for part in found.parts)
    assert found.seconds.value == pytest.approx(total)
    assert 0 < found.seconds.low < total < found.seconds.high < 2 * total
    assert found.epoch_seconds == pytest.approx(50 * found.step_seconds)


def test_operations_are_those_of_the_real_tokens_and_grow_by_what_is_repeated() -> None:
    """4 for a frozen weight and 6 for a trained one, of 100 steps x 512 tokens; attention's causal half on top."""
    counted = QWEN.counted
    assert counted is not None
    weights = 100 * 512 * (4 * counted.frozen + 6 * counted.trainable)
    attention = 100 * 4 * 512**2 * counted.attention_width / 2 * 3
    assert operations(asked(), work()) == pytest.approx(weights + attention)
    repeated = operations(asked(gradient_checkpointing=Checkpointing.full), work())
    assert 1.3 * weights < repeated < 1.5 * (weights + attention)


def test_a_measured_trial_sets_the_scale_whatever_the_width_of_its_rows() -> None:
    config = asked(seq_len=2048)
    line = roofline(config)
    slow = [trial(config, 1.5 * line.step([batch(2, 700)]).seconds, slots=1400, watts=300.0)]
    config_of_trial = replace(config, batch_size=2)
    source = of_trials(slow, line, config_of_trial, "trial", 0.1)
    assert source.scale == pytest.approx(1.5)
    assert source.watts == 300.0
    assert source.half == 0.1


def test_steps_take_as_long_as_their_micro_batches() -> None:
    config = asked()
    whole, part = (made(config, replace(work(), epoch_in_full_steps=full)) for full in (50.0, 40.0))
    steps = [next(part.seconds for part in each.parts if part.name == "100 steps") for each in (whole, part)]
    assert steps[1] == pytest.approx(0.8 * steps[0])
    assert part.epoch_seconds == pytest.approx(0.8 * whole.epoch_seconds)


def test_steps_that_varied_widen_the_interval() -> None:
    config = asked()
    calm = trial(config, 1.0, 512)
    speed = {"throughput/tokens_per_second": 512.0, "throughput/tokens_per_second_error": 256.0}
    varied = replace(calm, metrics={**calm.metrics, **speed})
    one = of_trials([varied], roofline(config), config, "trial", 0.1)
    four = of_trials([varied] * 4, roofline(config), config, "trial", 0.1)
    assert one.half == pytest.approx(math.hypot(0.1, math.log(1.5)))
    assert 0.1 < four.half < one.half


def test_only_finished_trials_of_the_same_settings_and_device_count() -> None:
    config = asked()
    same = trial(config, 1.0, 512)
    longer = replace(config, seq_len=config.seq_len * 2)
    others = [
        replace(same, outcome="out_of_memory"),
        replace(same, tags={"device": "NVIDIA L4"}),
        replace(same, tags={"device": DEVICE, "validity": "invalid"}),
        replace(same, metrics={}),
        trial(longer, 1.0, 512),
        trial(replace(config, engine=replace(config.engine, kind=EngineKind.graph)), 1.0, 512),
    ]
    later = trial(replace(config, seed=7, train=replace(config.train, epochs=3)), 1.0, 512)
    assert same_settings([same, *others, later], config, DEVICE) == [same, later]


def test_another_card_has_the_wider_interval_and_a_measured_kind_its_own() -> None:
    step = StepTime(1.0, 0.1, 0.0)
    known = of_rates(step, constants(), DEVICE, is_measured_kind=True, is_cpu=False)
    other = of_rates(step, constants(), "RTX 4090", is_measured_kind=False, is_cpu=False)
    assert known.half == constants().roofline.card.half
    assert other.half == pytest.approx(2 * known.half)


def test_energy_is_that_of_the_power_and_absent_without_one() -> None:
    measured = made(asked(), work(steps=36_000), watts=300.0)
    steady = next(part for part in measured.parts if "steps" in part.name)
    assert measured.kwh is not None
    assert measured.kwh.value == pytest.approx(300 * steady.seconds / 3.6e6, rel=0.01)
    estimated = made(asked(), work(steps=36_000))
    assert estimated.kwh is not None
    assert estimated.kwh.high / estimated.kwh.low > measured.kwh.high / measured.kwh.low
    power = constants().power
    assert 0.1 * 700 < 3.6e6 * estimated.kwh.value / estimated.seconds.value < 700 * (power.base + power.slope)
    absent = forecast(asked(), work(), roofline(asked()), Source("a test", 1.0, 0.1), power, None)
    assert absent.kwh is None
    assert "not known" in headline(absent, Prices(kwh=0.3))
    assert "electricity" not in headline(absent, Prices(kwh=0.3))


def test_money_follows_from_hours_and_energy() -> None:
    hour, kwh = Range(3600.0, 3000.0, 4500.0), Range(1.1, 1.0, 1.2)
    assert electricity(kwh, Prices(kwh=0.3)) == Range(pytest.approx(0.33), pytest.approx(0.3), pytest.approx(0.36))
    cost = rented(hour, Prices(hour=2.5))
    assert cost is not None
    assert cost.value == pytest.approx(2.5)
    assert rented(hour, Prices()) is None
    assert electricity(None, Prices(kwh=0.3)) is None
    assert hours_to_own(kwh, hour, Prices(kwh=0.5, hour=2.55, card=2000)) == pytest.approx(1000)
    assert hours_to_own(None, hour, Prices(hour=2.0, card=2000)) == 1000
    assert isinstance(hours_to_own(kwh, hour, Prices(kwh=3, hour=1, card=2000)), str)
    assert isinstance(hours_to_own(kwh, hour, Prices(card=2000)), str)
    assert hours_to_own(kwh, hour, Prices(hour=1)) is None


@pytest.mark.parametrize("text", ["0.30/kWh", "0.30", ".3 / kwh"])
def test_a_price_is_read_with_and_without_its_unit(text: str) -> None:
    assert read_price(text, "kWh", "--price") == 0.3


@pytest.mark.parametrize("text", ["free", "0", "-1", "0.3/h", "nan"])
def test_what_is_no_price_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="--price"):
        read_price(text, "kWh", "--price")


def test_long_epochs_get_advice_with_the_override_to_type() -> None:
    def of(hours: float) -> list[str]:
        load = work()
        config = asked(seq_len=2048, train=replace(asked().train, epochs=3))
        plain = made(config, load)
        return advice(config, made(config, load, scale=hours * 3600 / plain.epoch_seconds), on_card=True)

    assert of(5.9) == []
    rent = of(6.1)
    assert any("rent" in said for said in rent)
    assert not any("data.rows" in said for said in rent)
    reduce = " ".join(of(24.0))
    for override in ("data.rows=500", "train.epochs=1", "seq_len=320", "engine=graph"):
        assert override in reduce


def test_a_probe_measures_fifty_rows_or_half_a_minute() -> None:
    config = asked(batch_size=2)
    assert steps_of(config, 0.01) == 25
    assert 8 <= steps_of(config, 2.0) <= 15
    assert steps_of(config, 60.0) == 8, "too few steps say nothing"


def test_a_card_in_the_table_attains_less_than_is_published() -> None:
    speeds = card_named("RTX-4090").speeds(asked())
    assert 0.5 < speeds.flops_per_second / (CARDS["rtx4090"].tflops * 1e12) < 1
    with pytest.raises(InvalidInput, match="rtx3090"):
        card_named("gtx9")
    with pytest.raises(InvalidInput, match="precision=bf16"):
        card_named("h100").speeds(tiny_config())


def test_the_stated_intervals_cover_what_they_say_on_held_out_trials() -> None:
    found = constants()
    for judged in (found.roofline.card, found.roofline.host, found.probe.card, found.probe.host, found.power.judged):
        assert 0.85 <= judged.covered <= 0.95, "by the other groups' intervals"
        assert judged.cells >= 30
        assert judged.half >= math.log1p(judged.median)
