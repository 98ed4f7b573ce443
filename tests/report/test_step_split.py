"""A change of the step's time, split into GPU work and idle time."""

import statistics

import numpy as np
import pytest
from planted import trial
from scipy import stats

from lora_lab.report.measures import GPU_WORK, THROUGHPUT
from lora_lab.report.statistics.contrasts import Contrast, contrasts
from lora_lab.report.statistics.factors import Factor
from lora_lab.report.statistics.step_split import StepSplit
from lora_lab.store.trials import Trial

OPTIMIZER = Factor(name="optimizer", keys=("optimizer",), levels=("adamw", "paged_adamw"))
TOKENS = 4096


def run(step: float, gpu: float, repeat: int, optimizer: str, batch_size: str = "1", profiled: bool = True) -> Trial:
    """A trial whose steps take `step` seconds, of which the GPU works `gpu`."""
    figures = {"throughput/tokens_per_second": TOKENS / step, "throughput/steps_per_second": 1 / step}
    if profiled:
        figures["throughput/gpu_busy_share"] = gpu / step
    tags = {} if profiled else {"absent.throughput/gpu_busy_share": "no step was profiled"}
    return trial(figures, repeat=repeat, optimizer=optimizer, batch_size=batch_size, tags=tags, regime=None)


def pairs(steps: float, gpu: float, repeats: int = 4, noise: float = 0.02, seed: int = 0) -> list[Trial]:
    """Pairs whose host is noisy: paged_adamw's steps are `steps` longer, of which the GPU works `gpu`."""
    draw = np.random.default_rng(seed)
    made = []
    for repeat in range(repeats):
        waits = 0.5 + noise * draw.standard_normal(2)
        made.append(run(waits[0] + 0.1, 0.1, repeat, "adamw"))
        made.append(run(waits[1] + 0.1 + steps, 0.1 + gpu, repeat, "paged_adamw"))
    return made


def only(trials: list[Trial]) -> Contrast:
    (found,) = contrasts(trials, [OPTIMIZER], THROUGHPUT)
    return found


def test_the_gpus_work_is_known_exactly_where_the_hosts_noise_hides_the_step() -> None:
    found = only(pairs(steps=0.03, gpu=0.001)).split
    assert isinstance(found, StepSplit)
    assert found.gpu.value == pytest.approx(0.001)
    assert found.gpu.low == pytest.approx(0.001)
    assert found.step.value == pytest.approx(found.gpu.value + found.idle.value)
    assert found.step.high - found.step.value > 0.01


def test_its_interval_is_students_over_the_pairs() -> None:
    trials = pairs(steps=0.03, gpu=0.001, seed=5)
    steps = [1 / each.metrics["throughput/steps_per_second"] for each in trials]
    apart = [after - before for before, after in zip(steps[::2], steps[1::2], strict=True)]
    found = only(trials).split
    assert isinstance(found, StepSplit)
    known = stats.ttest_1samp(apart, 0.0).confidence_interval()
    assert (found.step.low, found.step.high) == pytest.approx((known.low, known.high))
    assert found.step.value == pytest.approx(statistics.fmean(apart))


def test_only_profiled_pairs_count_and_without_any_the_reason_is_given() -> None:
    whole = pairs(steps=0.03, gpu=0.001)
    lost = run(0.6, 0.0, 9, "adamw", profiled=False), run(0.7, 0.1, 9, "paged_adamw")
    found = only([*whole, *lost])
    assert found.pairs == 5
    assert isinstance(found.split, StepSplit)
    assert found.split.pairs == 4
    assert only(list(lost)).split == "no step was profiled"


def test_gpu_work_is_compared_per_token_and_by_ratio() -> None:
    trials = pairs(steps=0.0, gpu=0.01)
    (found,) = contrasts(trials, [OPTIMIZER], GPU_WORK)
    assert found.estimate.ratio == pytest.approx(1.1)
    assert GPU_WORK.of(trials[0]) == pytest.approx(1e6 * 0.1 / TOKENS)
    lost = run(0.6, 0.0, 0, "adamw", profiled=False)
    assert (GPU_WORK.of(lost), GPU_WORK.why_absent(lost)) == (None, "no step was profiled")


def test_a_settings_regime_is_that_of_its_mean_busy_share() -> None:
    """One noisy trial beyond the limit does not take its whole setting away from the others."""
    shares = [(0.70, 0.72), (0.68, 0.77), (0.71, 0.70)]
    trials = [
        run(1.0, share, repeat, level)
        for repeat, both in enumerate(shares)
        for level, share in zip(OPTIMIZER.levels, both, strict=True)
    ]
    assert only(trials).regime == "host-bound"
    assert only([run(1.0, share, 0, level) for level, share in (("adamw", 0.95), ("paged_adamw", 0.4))]).regime == (
        "GPU-bound to host-bound"
    )
