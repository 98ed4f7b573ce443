"""What a step costs: the model's own work, and what the device was made to do for it."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.events import MatmulRate, ModelCounted, Step
from lora_lab.telemetry.flops import FUSED, flops, repeated_share
from lora_lab.telemetry.window import Window

Rows = list[list[int]]
"""Each row's documents' lengths in tokens."""

MODEL = ModelCounted(
    t=0.0, frozen=10, frozen_in_layers=8, trainable=2, attention_width=3, weight_bytes=1, weight_elements=1
)
RATE = MatmulRate(t=0.0, dtype="bfloat16", size=8192, flops_per_second=1000.0)
NAMES = {
    "flops/per_token",
    "flops/per_token_products",
    "flops/per_token_attention_causal",
    "flops/per_token_attention_square",
    "flops/per_token_recomputation",
    "flops/model_tflop_per_second",
    "flops/hardware_tflop_per_second",
    "flops/mfu",
    "flops/hfu",
    "flops/matmul_tflop_per_second",
}


def step(rows: Rows, width: int) -> Step:
    lengths = [length for row in rows for length in row]
    return Step(
        t=1.0,
        step=1,
        seconds=1.0,
        loss=1.0,
        rows=len(rows),
        slots=len(rows) * width,
        real=sum(lengths),
        trained=sum(lengths),
        skipped=False,
        attended=sum(length**2 for length in lengths),
        attended_slots=len(rows) * width**2,
    )


def window(*steps: Step, seconds: float = 2.0) -> Window:
    return Window(100.0, 100.0 + seconds, steps)


def figures(
    measured: Window, *, checkpointing: float = 0.0, kernel: str = "flash", model: ModelCounted = MODEL
) -> dict[str, float]:
    metrics, absent = flops(model, measured, checkpointing, kernel, RATE)
    assert not absent
    assert metrics.keys() == NAMES
    return metrics


WIDTH = 64
ROWS = st.lists(st.lists(st.integers(1, WIDTH // 4), min_size=1, max_size=4), min_size=1, max_size=6)
WINDOWS = st.lists(ROWS, min_size=1, max_size=4).map(lambda made: window(*(step(rows, WIDTH) for rows in made)))
KERNELS = st.sampled_from(sorted([*FUSED, "math", "flash, memory_efficient"]))
MODELS = st.builds(
    ModelCounted,
    t=st.just(0.0),
    frozen=st.integers(1000, 10**9),
    frozen_in_layers=st.integers(1, 1000),
    trainable=st.integers(1, 10**7),
    attention_width=st.integers(1, 10**5),
    weight_bytes=st.just(1),
    weight_elements=st.just(1),
)


def test_an_example_by_hand() -> None:
    """Documents of 3 and 2 tokens in two rows of 4 slots: 9 + 4 of attended squares, 16 + 16 of slots."""
    padded = window(step([[3], [2]], width=4))
    told = figures(padded)
    assert told["flops/per_token_products"] == 4 * 10 + 6 * 2
    assert told["flops/per_token_attention_square"] == pytest.approx(3 * 4 * 13 * 3 / 5)
    assert told["flops/per_token_attention_causal"] == pytest.approx(3 * 4 * 13 * 3 / 5 / 2)
    assert told["flops/per_token"] == pytest.approx(98.8)
    assert told["flops/per_token_recomputation"] == 0.0
    assert told["flops/model_tflop_per_second"] == pytest.approx(5 * 98.8 / 2 / 1e12)
    assert told["flops/mfu"] == pytest.approx(5 * 98.8 / 2 / 1000)
    assert told["flops/matmul_tflop_per_second"] == pytest.approx(1e-9)

    assert told["flops/hfu"] == pytest.approx((8 * 52 + 3.5 * 4 * 32 * 3) / 2 / 1000)
    assert told["flops/hardware_tflop_per_second"] == pytest.approx(told["flops/hfu"] * 1000 / 1e12)
    assert figures(padded, kernel="math")["flops/hfu"] == pytest.approx((8 * 52 + 3 * 4 * 32 * 3) / 2 / 1000)

    again = figures(padded, checkpointing=1.0)
    assert again["flops/per_token_recomputation"] == pytest.approx(2 * (8 + 2) + 4 * 13 * 3 / 2 / 5)
    assert again["flops/hfu"] == pytest.approx((8 * (52 + 20) + 4.5 * 4 * 32 * 3) / 2 / 1000)


@pytest.mark.parametrize(
    ("checkpointing", "layers", "share"),
    [
        ("none", 28, 0.0),
        ("full", 28, 1.0),
        ("selective", 28, 0.5),
        ("selective", 5, 0.6),  # the first, the third and the fifth
        ("selective", 1, 1.0),
        ("selective", None, 0.5),
        ("offloaded", 28, 1.0),
        ("False", None, 0.0),  # as trials said it before there was a selective one
        ("True", None, 1.0),
        ("True", 28, 1.0),
    ],
)
def test_the_share_of_layers_that_is_calculated_twice(checkpointing: str, layers: int | None, share: float) -> None:
    assert repeated_share(checkpointing, layers) == share


@given(measured=WINDOWS, kernel=KERNELS, model=MODELS, share=st.floats(0, 1))
def test_recomputation_grows_with_the_share_of_layers(
    measured: Window, kernel: str, model: ModelCounted, share: float
) -> None:
    none, some, full = (figures(measured, kernel=kernel, checkpointing=c, model=model) for c in (0.0, share, 1.0))
    for name in ("flops/per_token_recomputation", "flops/hfu", "flops/hardware_tflop_per_second"):
        assert some[name] == pytest.approx(none[name] + share * (full[name] - none[name]))


def test_fused_kernels_leave_out_half_of_a_full_row_and_others_do_not() -> None:
    full = window(step([[4], [4]], width=4))
    assert figures(full)["flops/hfu"] == pytest.approx((8 * 52 + 3.5 * 4 * 32 * 3 / 2) / 2 / 1000)
    assert figures(full, kernel="math")["flops/hfu"] == pytest.approx((8 * 52 + 3 * 4 * 32 * 3) / 2 / 1000)
    again = figures(full, checkpointing=1.0)
    assert again["flops/hfu"] == pytest.approx((8 * 72 + 4.5 * 4 * 32 * 3 / 2) / 2 / 1000)


def test_full_fine_tunings_six_a_token_is_not_loras_four() -> None:
    short = window(step([[1] * 8], width=8))
    large = replace(MODEL, frozen=10**9, trainable=0)
    assert figures(short, model=large)["flops/per_token"] == pytest.approx(4e9, rel=1e-6)


@given(
    rows=ROWS, wider=st.integers(1, 200), kernel=KERNELS, checkpointing=st.sampled_from([0.0, 0.5, 1.0]), model=MODELS
)
def test_padding_is_the_devices_work_and_not_the_models(
    rows: Rows, wider: int, kernel: str, checkpointing: float, model: ModelCounted
) -> None:
    narrow, wide = (
        figures(window(step(rows, width)), kernel=kernel, checkpointing=checkpointing, model=model)
        for width in (WIDTH, WIDTH + wider)
    )
    of_the_device = {"flops/hardware_tflop_per_second", "flops/hfu"}
    assert all(wide[name] > narrow[name] for name in of_the_device)
    assert all(wide[name] == narrow[name] for name in NAMES - of_the_device)


@given(measured=WINDOWS, kernel=KERNELS, checkpointing=st.sampled_from([0.0, 0.5, 1.0]), model=MODELS)
def test_the_device_never_does_less_than_the_model_needs(
    measured: Window, kernel: str, checkpointing: float, model: ModelCounted
) -> None:
    told = figures(measured, kernel=kernel, checkpointing=checkpointing, model=model)
    assert 0 < told["flops/mfu"] <= told["flops/hfu"] * (1 + 1e-12)


@given(measured=WINDOWS, kernel=KERNELS, model=MODELS)
def test_checkpointing_is_work_for_the_device_alone(measured: Window, kernel: str, model: ModelCounted) -> None:
    plain, again = (figures(measured, kernel=kernel, checkpointing=c, model=model) for c in (0.0, 1.0))
    assert again["flops/per_token_recomputation"] > plain["flops/per_token_recomputation"] == 0.0
    assert again["flops/hfu"] > plain["flops/hfu"]
    assert again["flops/per_token"] == plain["flops/per_token"]
    assert again["flops/mfu"] == plain["flops/mfu"]


@given(measured=WINDOWS, kernel=KERNELS, checkpointing=st.sampled_from([0.0, 0.5, 1.0]))
def test_twice_the_tokens_in_the_same_time_are_twice_the_rate(
    measured: Window, kernel: str, checkpointing: float
) -> None:
    once = figures(measured, kernel=kernel, checkpointing=checkpointing)
    doubled = window(*measured.steps, *measured.steps, seconds=measured.seconds)
    twice = figures(doubled, kernel=kernel, checkpointing=checkpointing)
    for name in NAMES:
        rate = name.endswith(("second", "fu")) and "matmul" not in name
        assert twice[name] == pytest.approx((2 if rate else 1) * once[name])


@given(measured=WINDOWS, factor=st.floats(0.1, 10))
def test_a_utilisation_is_a_share_of_the_measured_rate(measured: Window, factor: float) -> None:
    told = figures(measured)
    other, _ = flops(MODEL, measured, 0.0, "flash", replace(RATE, flops_per_second=1000 * factor))
    for name, rate in (("flops/mfu", "model"), ("flops/hfu", "hardware")):
        assert other[name] == pytest.approx(told[name] / factor)
        assert other[name] == pytest.approx(
            other[f"flops/{rate}_tflop_per_second"] / other["flops/matmul_tflop_per_second"]
        )


@given(lengths=st.lists(st.integers(1, 16), min_size=2, max_size=4))
def test_a_packed_row_costs_the_model_what_its_documents_cost_apart(lengths: list[int]) -> None:
    packed = figures(window(step([lengths], width=WIDTH)))
    apart = figures(window(step([[length] for length in lengths], width=WIDTH)))
    joined = figures(window(step([[sum(lengths)]], width=WIDTH)))
    assert packed["flops/per_token"] == pytest.approx(apart["flops/per_token"])
    assert packed["flops/per_token"] < joined["flops/per_token"], "documents don't attend to each other"
    assert packed["flops/hfu"] < apart["flops/hfu"], "the same slots once in place of several times"


def test_longer_documents_cost_more_a_token() -> None:
    short, long = (figures(window(step([[length]], width=length))) for length in (8, 16))
    for name in ("flops/per_token_attention_causal", "flops/per_token_attention_square"):
        assert long[name] == pytest.approx(2 * short[name])
    assert long["flops/per_token_products"] == short["flops/per_token_products"]


MEASURED = window(step([[4]], width=4))
WITHOUT_LENGTHS = window(replace(MEASURED.steps[0], attended=0, attended_slots=0))
OF_THE_RATE = {"flops/mfu", "flops/hfu", "flops/matmul_tflop_per_second"}
OF_THE_KERNEL = {"flops/hardware_tflop_per_second", "flops/hfu"}


@pytest.mark.parametrize(
    ("given", "missing", "why"),
    [
        ({"rate": None}, OF_THE_RATE, "rate was not measured"),
        ({"attention_kernel": "not seen"}, OF_THE_KERNEL, "kernel was not seen"),
        ({"attention_kernel": "ring"}, OF_THE_KERNEL, "is ring"),
        ({"attention_kernel": "flash, math"}, OF_THE_KERNEL, "is flash, math"),
        ({"repeated": None}, OF_THE_KERNEL | {"flops/per_token_recomputation"}, "MLPs in tiles"),
        ({"window": None}, NAMES - {"flops/matmul_tflop_per_second"}, "window was not completed"),
        ({"counted": None}, NAMES - {"flops/matmul_tflop_per_second"}, "were not counted"),
        ({"window": WITHOUT_LENGTHS}, NAMES - {"flops/matmul_tflop_per_second"}, "how long their documents"),
        ({"window": None, "counted": None, "rate": None}, NAMES, ""),
        ({"attention_kernel": "not seen", "rate": None}, OF_THE_KERNEL | OF_THE_RATE, ""),
    ],
)
def test_what_is_missing_says_why_and_is_no_zero(given: dict[str, Any], missing: set[str], why: str) -> None:
    asked: dict[str, Any] = {
        "counted": MODEL,
        "window": MEASURED,
        "repeated": 1.0,
        "attention_kernel": "flash",
        "rate": RATE,
    }
    metrics, absent = flops(**asked | given)
    assert absent.keys() == missing
    assert metrics.keys() == NAMES - missing
    assert all(why in reason and reason for reason in absent.values())
    assert all(metrics.values())
