"""What the headline may conclude, and from which figures."""

import dataclasses
import io
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict

import pytest
from planted import factorial, trial
from rich.console import Console

from lora_lab.comparison.rule import RULE_TAG, Contrast, Rule
from lora_lab.report.findings import Findings, Question, find
from lora_lab.report.measures import BUSY_SHARE, THROUGHPUT
from lora_lab.report.writing.headline import notes, sentences
from lora_lab.report.writing.page.page import page
from lora_lab.report.writing.terminal import show
from lora_lab.store.trials import Sweep, Trial


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


def auto(trials: list[Trial]) -> Findings:
    """Return the findings of a sweep with repeats=auto that compares the optimizers."""
    contrast = Contrast(
        key="optimizer", over="adamw", of="paged_adamw", over_points=("adamw",), of_points=("paged_adamw",)
    )
    rule = Rule(contrasts=(contrast,), margin_percent=1.0, budget_minutes=5.0, first_pairs=3)
    sweep = Sweep(
        run_id="sweep0",
        name="auto",
        outcome="finished",
        params={},
        tags={RULE_TAG: json.dumps(asdict(rule))},
        started_ms=0,
    )
    tagged = [dataclasses.replace(each, tags={**each.tags, "point": each.params["optimizer"]}) for each in trials]
    return find(tagged, [sweep], Question(), "0")


@pytest.mark.parametrize(("repeats", "answer"), [(9, "equivalent"), (2, "not settled"), (1, "not settled")])
def test_beside_the_answer_of_a_rule_nothing_else_judges_its_contrast(repeats: int, answer: str) -> None:
    findings = auto(pairs((1000.0, 997.0), repeats=repeats))
    text = io.StringIO()
    show(findings, Console(file=text, width=200))
    for told in (text.getvalue(), page(findings, {}).partition("Every configuration")[0]):
        assert answer in told
        assert "paged_adamw was" not in told
        assert "paged_adamw instead of" not in told
        assert "beyond noise" not in told
        assert "as fast" not in told
        assert "repeats=5" not in told
    assert any("repeats=auto" in note for note in notes(findings))


def test_what_the_rule_does_not_compare_is_still_reported() -> None:
    trials = pairs((1000.0, 997.0)) + [
        dataclasses.replace(each, run_id=f"{each.run_id}b", params={**each.params, "batch_size": "2"},
                            metrics={THROUGHPUT.key: 1.5 * each.metrics[THROUGHPUT.key]})
        for each in pairs((1000.0, 997.0))
    ]  # fmt: skip
    told = " ".join(sentences(auto(trials)))
    assert "2x512 was 50.0 % faster" in told
    assert "paged_adamw was" not in told


@pytest.mark.parametrize(("idle", "gpu", "carries"), [(0.03, 0.001, False), (0.001, 0.03, True)])
@pytest.mark.parametrize("make", [found, auto])
def test_a_difference_of_idle_time_is_not_expected_on_another_host(
    make: Callable[[list[Trial]], Findings], idle: float, gpu: float, carries: bool
) -> None:
    trials = []
    for repeat, optimizer in itertools.product(range(5), ("adamw", "paged_adamw")):
        paged = optimizer == "paged_adamw"
        step = 1.0 + 1e-4 * ((repeat * 7 + paged * 2) % 3 - 1) + (idle + gpu) * paged
        figures = {
            THROUGHPUT.key: 4096 / step,
            "throughput/steps_per_second": 1 / step,
            BUSY_SHARE: (0.95 + gpu * paged) / step,
        }
        trials.append(trial(figures, repeat=repeat, optimizer=optimizer))
    told = " ".join(sentences(make(trials)))
    assert ("similar order on other hosts" in told) is carries
    assert ("idle time" in told) is not carries


def test_where_nothing_has_figures_each_reason_is_given_once() -> None:
    findings = found(
        [
            *(trial({}, outcome="out_of_memory", repeat=n, tags={"reason": "no room"}) for n in range(3)),
            trial({}, outcome="failed", method="lora", tags={"reason": "no model_id at all"}),
            trial({THROUGHPUT.key: 9.0}, batch_size="2", validity="invalid", tags={"validity_reasons": "heat"}),
            trial({THROUGHPUT.key: math.nan}, batch_size="3"),
        ]
    )
    for told in (" ".join(sentences(findings)), page(findings, {})):
        for reason in ("no room", "no model_id at all", "heat", "without figures"):
            assert reason in told
    assert len(sentences(findings)) == 6
    assert sum("no room" in line and "3 times" in line for line in sentences(findings)) == 1


def test_of_many_reasons_a_few_are_given() -> None:
    trials = [trial({}, outcome="failed", tags={"reason": f"fault {n}"}) for n in range(30)]
    assert len(sentences(found(trials))) < 10


def test_that_every_other_is_slower_is_said_of_all_of_them_together() -> None:
    """A difference whose own interval just leaves out 0 is no longer seen as one of six."""

    def repeats(optimizer: str, changes: list[float]) -> list[Trial]:
        return [
            trial({THROUGHPUT.key: 1000 * math.exp(change)}, repeat=repeat, optimizer=optimizer)
            for repeat, change in enumerate(changes)
        ]

    fast = repeats("adamw", [0.0] * 5)
    close = repeats("paged_adamw", [-0.01 + 0.007 * each for each in (-1.26, -0.63, 0.0, 0.63, 1.26)])  # t = 3.2
    [alone] = found([*fast, *close]).groups
    assert alone.as_fast == 0
    slow = [each for n in range(5) for each in repeats(f"slow{n}", [-1.0, -1.01, -1.0, -0.99, -1.0])]
    [among_six] = found([*fast, *close, *slow]).groups
    assert among_six.as_fast == 1


def test_many_configurations_do_not_make_a_slow_one_as_fast() -> None:
    """Three repeats say too little of their own noise for 36 statements; the noise of all points says enough."""
    levels = {"optimizer": [f"o{n}" for n in range(12)], "precision": ["fp16", "bf16", "fp32"]}
    effects = {"optimizer=o0": 1.0, "optimizer=o1": 0.98}
    [group] = found(factorial(levels, effects, noise=0.03, drift=0.03, repeats=3, random=2)).groups
    assert 3 <= group.as_fast <= 5  # o0 and o1 in each precision; at 3 % of noise 2 % are not seen


def test_what_was_only_predicted_is_named_and_counts_for_nothing() -> None:
    """A skipped point is no run out of memory, no trial that is missing, and nothing once it ran."""
    ran = pairs((1000.0, 900.0))
    skipped = trial(outcome="predicted_out_of_memory", batch_size="64", tags={"point": "large"})
    sweep = Sweep(run_id="sweep0", name="", outcome="finished", params={"trials": "11"}, tags={}, started_ms=0)
    made = find([*ran, skipped], [sweep], Question(), "0")
    told = " ".join(notes(made))
    assert "1 point skipped" in told
    assert "planned" not in told, "nothing is missing"
    assert "out of memory" not in told
    assert [each.trial.run_id for each in made.groups[0].group.excluded] == [skipped.run_id]
    assert not [fit for fit in made.groups[0].fits if fit.next]
    more = dataclasses.replace(sweep, params={"trials": "18", "repeats": "5"})
    told = " ".join(notes(find([*ran, skipped], [more], Question(), "0")))
    assert "10 of the 13 planned" in told, "a skipped point is no trial that has been run, and takes its repeats along"
    since = trial(outcome="out_of_memory", batch_size="64", tags={"point": "large"})
    told = " ".join(notes(find([*ran, skipped, since], [sweep], Question(), "0")))
    assert "skipped" not in told
    assert "1 out of memory" in told
