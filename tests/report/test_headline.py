"""What the headline may conclude, and from which figures."""

import math

import pytest
from planted import trial

from lora_lab.report.findings import Findings, Question, find
from lora_lab.report.measures import THROUGHPUT
from lora_lab.report.writing.headline import sentences
from lora_lab.store.trials import Trial


def found(trials: list[Trial]) -> Findings:
    return find(trials, [], Question(), "0")


def pairs(rates: tuple[float, float], repeats: int = 5, noise: float = 0.001) -> list[Trial]:
    """Pairs of adamw and paged_adamw at these tokens per second."""
    made = []
    for repeat in range(repeats):
        for optimizer, rate in zip(("adamw", "paged_adamw"), rates, strict=True):
            figures = {THROUGHPUT.key: rate * (1 + noise * ((repeat * 7) % 3 - 1))}
            made.append(trial(figures, repeat=repeat, optimizer=optimizer))
    return made


@pytest.mark.parametrize(
    ("outcome", "validity", "rate"),
    [
        ("out_of_memory", "valid", None),
        ("finished", "invalid", 900.0),
        ("finished", "valid", math.nan),
        ("finished", "valid", 0.0),
    ],
)
def test_a_configuration_without_figures_is_not_slower(outcome: str, validity: str, rate: float | None) -> None:
    whole = [each for each in pairs((1000.0, 1.0)) if each.params["optimizer"] == "adamw"]
    figures = {} if rate is None else {THROUGHPUT.key: rate}
    lost = [
        trial(figures, repeat=repeat, optimizer="paged_adamw", outcome=outcome, validity=validity)
        for repeat in range(5)
    ]
    told = " ".join(sentences(found([*whole, *lost])))
    assert "slower" not in told
    assert "fastest" not in told
    assert "no two trials differ" not in told
    assert "figures on both sides" in told


def test_points_that_differ_in_two_settings_are_not_neighbours() -> None:
    trials = [
        trial({THROUGHPUT.key: rate}, repeat=repeat, optimizer=optimizer, method=method)
        for repeat in range(2)
        for optimizer, method, rate in (("adamw", "lora", 900.0), ("paged_adamw", "qlora", 1000.0))
    ]
    assert "figures on both sides" not in " ".join(sentences(found(trials)))
