"""How often repeats=auto answers wrongly, and after how many pairs: simulated, with the product's own judge.

    python -m benchmarks.stopping [OUT [SEEDS]]

Each seed is a sweep of pairs in random order AB or BA. A trial's log speed is the effect plus noise. Noise is
independent, or an AR(1) of 0.6 from trial to trial, or independent on top of a drift of 10 % over 20 pairs, or on top
of spells of six trials that are 20 % slower. It is given as the standard deviation of a pair's difference where trials
are independent. Two other rules are simulated with the product's:

- Stein's two stages (1945, A Two-Sample Test for a Linear Hypothesis Whose Power is Independent of the Variance). The
  first five pairs give the variance, that the number of pairs at which one of both tests must decide. One decision.
- The same two tests after every pair from the fifth on, at 5 % each time: what a person does who looks and waits.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from benchmarks.reports import markdown, provenance, write_report
from lora_lab.comparison.judge import Answer, Run, judge
from lora_lab.comparison.rule import TOKENS_PER_SECOND, Contrast, Rule
from lora_lab.store.environment import environment

SEEDS = 2000
MOST_PAIRS = 200
BUDGET_PAIRS = 10
"""Pairs of one minute each in the default budget."""
FIRST = 5
LEVEL = 0.05
AR, DRIFT = 0.6, 0.10 / 40
SPELL_STARTS, SPELL_TRIALS, SPELL_SPEED = 0.02, 6, 0.8
"""How often a slow spell of the host begins, how many trials it lasts, and the speed in it."""

OUT = Path(__file__).parent / "results/cpu"

Floats = NDArray[np.float64]
Outcomes = list[tuple[Answer, int]]
"""The answer of each seed and its pairs."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is true in a simulated sweep."""

    bound: str
    sd: float
    """Of a pair's difference of logarithms."""
    margin_percent: float
    noise: str = "independent"


def _words(scenario: Scenario) -> str:
    noise = "" if scenario.noise == "independent" else f", {scenario.noise}"
    return f"{scenario.bound} {100 * scenario.sd:g} %{noise}; margin {scenario.margin_percent:g} %"


SCENARIOS = (
    Scenario("GPU-bound", 0.005, 1.0),
    Scenario("GPU-bound", 0.005, 1.0, "AR(1)"),
    Scenario("GPU-bound", 0.005, 1.0, "drift"),
    Scenario("GPU-bound", 0.008, 1.0),
    Scenario("host-bound", 0.08, 5.0),
    Scenario("host-bound", 0.08, 5.0, "AR(1)"),
    Scenario("host-bound", 0.08, 5.0, "drift"),
    Scenario("host-bound", 0.08, 5.0, "slow spells"),
    Scenario("host-bound", 0.08, 1.0),
)
COMPARED = [_words(each) for each in SCENARIOS if each.noise == "independent"]
"""The scenarios of which docs/sweeps.md shows every rule."""
EFFECTS = {"0": 0.0, "half": 0.5, "the margin": 1.0, "3 margins": 3.0}
"""True changes, in margins."""


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    seeds = int(sys.argv[2]) if len(sys.argv) > 2 else SEEDS
    rows = [simulated(scenario, rule, seeds) for scenario in SCENARIOS for rule in RULES]
    families = [family(scenario, seeds) for scenario in SCENARIOS if scenario.noise == "independent"]
    two = "Two contrasts in one sweep (Holm): how often either is wrong, both being 0, or both at the margin"
    text = f"{table(rows)}\n\n{two}\n\n{of_families(families)}"
    title = f"How often repeats=auto is wrong, and after how many pairs: {seeds} simulated sweeps a figure"
    origin = provenance(environment(), "python -m benchmarks.stopping")
    write_report(out, "stopping", title, origin, text, {"seeds": seeds, "rows": rows, "families": families})


def quoted() -> str:
    """Return the block of docs/sweeps.md, from the stored figures."""
    stored = json.loads((OUT / "stopping.json").read_text(encoding="utf-8"))
    compared = [row for row in stored["rows"] if row["rule"] == "repeats=auto" or row["scenario"] in COMPARED]
    two = "Two contrasts in one sweep, both without effect or both at the margin:"
    how = f"{stored['seeds']:,} simulated sweeps for each figure, commit {stored['origin']['commit'][:7]}."
    return f"{table(compared)}\n\n{two}\n\n{of_families(stored['families'])}\n\n{how}"


def simulated(scenario: Scenario, rule: str, seeds: int) -> dict[str, Any]:
    """Return what a rule answers to each effect."""
    by_effect = {}
    for name, times in EFFECTS.items():
        found = differences(scenario, times * math.log1p(scenario.margin_percent / 100), seeds)
        by_effect[name] = _shares(RULES[rule](found, scenario.margin_percent))
    return {"scenario": _words(scenario), "rule": rule, "by_effect": by_effect}


def differences(scenario: Scenario, effect: float, seeds: int, first_seed: int = 0) -> Floats:
    """Return B's log speed less A's: a row of MOST_PAIRS pairs for each seed."""
    rng = np.random.default_rng([first_seed, seeds])
    sd, trials = scenario.sd / math.sqrt(2), 2 * MOST_PAIRS
    noise = sd * rng.standard_normal((seeds, trials))
    if scenario.noise == "AR(1)":
        noise[:, 1:] *= math.sqrt(1 - AR**2)
        for trial in range(1, trials):
            noise[:, trial] += AR * noise[:, trial - 1]
    if scenario.noise == "drift":
        noise -= DRIFT * np.arange(trials)
    if scenario.noise == "slow spells":
        starts = rng.random((seeds, trials)) < SPELL_STARTS
        slow = np.array(
            [starts[:, max(0, trial - SPELL_TRIALS + 1) : trial + 1].any(axis=1) for trial in range(trials)]
        )
        noise += math.log(SPELL_SPEED) * slow.T
    later = noise[:, 1::2] - noise[:, ::2]
    order = rng.choice([-1.0, 1.0], size=later.shape)
    return effect + order * later


def product(found: Floats, margin_percent: float) -> Outcomes:
    """Judge by the product's rule."""
    outcomes = []
    for seed in found:
        [(answer, pairs)] = judged([seed], margin_percent)
        outcomes.append((answer, pairs))
    return outcomes


def judged(contrasts: list[Floats], margin_percent: float) -> Outcomes:
    """Return the product's answer to each contrast of one sweep."""
    names = [(f"A{number}", f"B{number}") for number in range(len(contrasts))]
    rule = Rule(
        contrasts=tuple(Contrast(key=of, over=over, of=of, over_points=(over,), of_points=(of,)) for over, of in names),
        margin_percent=margin_percent,
        budget_minutes=1.0,
        first_pairs=FIRST,
    )
    runs = [
        Run(block=block, point=point, outcome="finished", reason="", tags={}, metrics={TOKENS_PER_SECOND: speed})
        for (over, of), pairs in zip(names, contrasts, strict=True)
        for block, speeds in enumerate(np.exp(pairs))
        for point, speed in ((over, 1.0), (of, float(speeds)))
    ]
    return [(verdict.answer, verdict.pairs) for verdict in judge(rule, runs)]


def stein(found: Floats, margin_percent: float) -> Outcomes:
    """Judge by Stein's two stages."""
    margin = math.log1p(margin_percent / 100)
    one, two = student.isf(LEVEL, FIRST - 1), student.isf(LEVEL / 2, FIRST - 1)
    spread = found[:, :FIRST].std(axis=1, ddof=1)
    needed = np.maximum(FIRST, np.ceil(((one + two) * spread / margin) ** 2)).astype(int)
    outcomes = []
    for pairs, count, sd in zip(found, needed, spread, strict=True):
        if count > MOST_PAIRS:
            outcomes.append((Answer.unsettled, MOST_PAIRS))
            continue
        outcomes.append((_answer(pairs[:count].mean(), sd / math.sqrt(count), margin, one, two), int(count)))
    return outcomes


def naive(found: Floats, margin_percent: float) -> Outcomes:
    """Judge after every pair, as if it were the only look."""
    margin = math.log1p(margin_percent / 100)
    counts = np.arange(FIRST, MOST_PAIRS + 1)
    one, two = student.isf(LEVEL, counts - 1), student.isf(LEVEL / 2, counts - 1)
    sums, squares = np.cumsum(found, axis=1)[:, FIRST - 1 :], np.cumsum(found**2, axis=1)[:, FIRST - 1 :]
    means = sums / counts
    errors = np.sqrt(np.maximum(squares - counts * means**2, 0.0) / (counts - 1) / counts)
    decides = (np.abs(means) + one * errors <= margin) | (np.abs(means) > two * errors)
    outcomes = []
    for seed in range(len(found)):
        if not decides[seed].any():
            outcomes.append((Answer.unsettled, MOST_PAIRS))
            continue
        at = int(decides[seed].argmax())
        outcomes.append((_answer(means[seed, at], errors[seed, at], margin, one[at], two[at]), int(counts[at])))
    return outcomes


def _answer(mean: float, error: float, margin: float, one: float, two: float) -> Answer:
    if abs(mean) + one * error <= margin * (1 + 1e-12):
        return Answer.equivalent
    if abs(mean) > two * error:
        return Answer.faster if mean > 0 else Answer.slower
    return Answer.unsettled


def family(scenario: Scenario, seeds: int) -> dict[str, Any]:
    """Return how often two contrasts together hold a wrong answer."""
    effects = (0.0, math.log1p(scenario.margin_percent / 100))
    wrong = []
    for effect, answers in zip(effects, ({Answer.faster, Answer.slower}, {Answer.equivalent}), strict=True):
        first, second = (differences(scenario, effect, seeds, first) for first in (1, 2))
        both = [judged([one, two], scenario.margin_percent) for one, two in zip(first, second, strict=True)]
        wrong.append(sum(any(answer in answers for answer, _ in each) for each in both) / seeds)
    return {"scenario": _words(scenario), "false_change": wrong[0], "false_equivalent": wrong[1]}


def _shares(outcomes: Outcomes) -> dict[str, float]:
    answers, pairs = [answer for answer, _ in outcomes], [pairs for _, pairs in outcomes]
    settled = [answer is not Answer.unsettled for answer in answers]
    return {
        "changed": sum(answer in (Answer.faster, Answer.slower) for answer in answers) / len(answers),
        "equivalent": answers.count(Answer.equivalent) / len(answers),
        "pairs": sum(pairs) / len(pairs),
        "in_budget": sum(s and n <= BUDGET_PAIRS for s, n in zip(settled, pairs, strict=True)) / len(pairs),
    }


RULES: dict[str, Callable[[Floats, float], Outcomes]] = {
    "repeats=auto": product,
    "Stein": stein,
    "every pair": naive,
}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    head = [
        "noise",
        "rule",
        "false change",
        "false equivalent",
        *(f"pairs at {name}" for name in EFFECTS),
        f"settled in {BUDGET_PAIRS} pairs at 0",
        "and at 3 margins",
    ]
    lines = []
    for row in rows:
        effects = row["by_effect"]
        pairs = [f"{each['pairs']:.1f}" for each in effects.values()]
        settled = [f"{effects[name]['in_budget']:.0%}" for name in ("0", "3 margins")]
        wrong = [f"{effects['0']['changed']:.1%}", f"{effects['the margin']['equivalent']:.1%}"]
        lines.append([row["scenario"], row["rule"], *wrong, *pairs, *settled])
    return markdown(head, lines)


def of_families(families: Sequence[Mapping[str, Any]]) -> str:
    """Return how often a family is wrong, as a Markdown table."""
    head = ["noise", "a false change", "a false equivalent"]
    return markdown(
        head,
        [[each["scenario"], f"{each['false_change']:.1%}", f"{each['false_equivalent']:.1%}"] for each in families],
    )


if __name__ == "__main__":
    main()
