"""The headline in three sentences: what was best, which factors had an effect, and what that means for claims."""

from collections import Counter
from collections.abc import Sequence

from lora_lab.report.answers.claims.study import Study
from lora_lab.report.answers.claims.verdict import Verdict
from lora_lab.report.answers.pareto import Point
from lora_lab.report.findings import Findings, GroupFindings
from lora_lab.report.measures import ENERGY, LOSS, MEASURES, THROUGHPUT, Better, Measure
from lora_lab.report.statistics.contrasts import Contrast
from lora_lab.report.statistics.factors import SHAPE
from lora_lab.report.writing.labels import count, level_text, levels_text, outcome_text, usual_levels
from lora_lab.report.writing.numbers import format_short
from lora_lab.store.trials import Sweep


def sentences(findings: Findings) -> tuple[str, ...]:
    """Return three sentences on the environment with most trials; others are only mentioned."""
    groups, verdicts = findings.groups, findings.verdicts
    main = groups[0]
    last = _on_claims(main, verdicts) if verdicts else _on_regimes(main)
    others = len(groups) - 1
    apart = f" {count(others, 'other environment')} reported separately, not averaged in." if others else ""
    return (_on_best(main) + _on_the_rest(groups, findings.sweeps), _on_effects(main), last + apart)


def _on_the_rest(groups: Sequence[GroupFindings], sweeps: Sequence[Sweep]) -> str:
    """Return how many planned trials have not been run, so that a part is not mistaken for the whole."""
    over = Counter(trial.sweep for found in groups for trial in found.group.trials)
    planned = sum(sweep.planned or 0 for sweep in sweeps)
    done = sum(min(over[sweep.run_id], sweep.planned or 0) for sweep in sweeps)
    if done == planned:
        return ""
    return f" Only {done} of the {planned} planned trials have been run (resume=true runs the rest)."


def _on_best(found: GroupFindings) -> str:
    device, points = found.group.place.device, [point for point in found.points if point.figures]
    if not points:
        ends = Counter(trial.outcome for trial in found.group.trials)
        how = ", ".join(f"{number} {outcome_text(end)}" for end, number in ends.items()) or "all were cut short"
        return f"On {device} no trial finished with figures that can be compared ({how})."
    if len(found.points) == 1:
        figures = [m.write(points[0].figures[m.name][0]) for m in MEASURES if m.name in points[0].figures]
        return f"On {device} {_name(points[0], found)} reached {', '.join(figures)}."
    ended = Counter(outcome for point in found.points for outcome in point.outcomes if outcome != "finished")
    others = ", ".join(f"{number} {outcome_text(outcome)}" for outcome, number in ended.items())
    ran = f"{len(points)} of {len(found.points)} configurations ran to the end" + (f" ({others})" if others else "")
    rated = [point for point in points if THROUGHPUT.name in point.figures]
    if not rated:
        return f"On {device} {ran}; none has a throughput."
    fastest = _best(rated, THROUGHPUT)
    rates = [point.figures[THROUGHPUT.name][0] for point in rated]
    said = f"the fastest was {_name(fastest, found)} with {THROUGHPUT.write(max(rates))}"
    said += f", {max(rates) / min(rates):.3g} times the slowest" if len(rates) > 1 else ""
    if found.as_fast:
        said += f" ({found.as_fast} of the {len(rates) - 1} others do not differ significantly from it)"
    drawn = [point for point in points if ENERGY.name in point.figures]
    if drawn:
        thriftiest = _best(drawn, ENERGY)
        figure = ENERGY.write(thriftiest.figures[ENERGY.name][0])
        same = thriftiest is fastest
        said += (
            f", and least energy, {figure}"
            if same
            else f"; the least energy was used by {_name(thriftiest, found)}, {figure}"
        )
    learned = [point for point in points if LOSS.name in point.figures]
    if len(learned) > 1:
        least = _best(learned, LOSS)
        said += (
            f"; the lowest held-out loss is that of {_name(least, found)}, {LOSS.write(least.figures[LOSS.name][0])}"
        )
    return f"On {device}, {ran}; by their medians {said}."


def _on_effects(found: GroupFindings) -> str:
    if not found.contrasts:
        return "Effects cannot be estimated: no two trials of one sweep and repeat differ in only one setting."
    told = [f"In tokens/s, all else equal: {_effects(found, THROUGHPUT)}."]
    if any(each.measure is LOSS and each.estimate.seen for each in found.contrasts):
        told.append(f"In held-out loss: {_effects(found, LOSS)}.")
    return " ".join(told)


def _effects(found: GroupFindings, measure: Measure) -> str:
    factors = {factor.name: factor for factor in found.compared}
    shape = {factor.name for factor in found.compared if set(factor.keys) <= set(SHAPE)}
    by_level: dict[tuple[str, str, str], list[Contrast]] = {}
    made = [each for each in found.contrasts if each.measure is measure]
    for each in made:
        if each.factor not in shape:
            by_level.setdefault((each.factor, each.of, each.over), []).append(each)
    parts = []
    for (name, of, over), those in by_level.items():
        factor = factors[name]
        tied = " together" if len(factor.keys) > 1 else ""
        parts.append(f"{level_text(factor, of)}{tied} against {level_text(factor, over)} {_by_regime(those)}")
    shapes = [each for each in made if each.factor in shape]
    if shapes:
        widest = max(shapes, key=lambda each: abs(each.estimate.value))
        parts.append(f"{widest.of} (batch x seq) against {widest.over} {_by_regime([widest])}")
    return "; ".join(parts) or f"no pair of trials has a {measure.title}"


def _by_regime(those: Sequence[Contrast]) -> str:
    """Return the effect per regime. Mixed regimes are left to the tables if there are others."""
    clear = [each for each in those if each.regime != "mixed"] or those
    several = len({each.regime for each in clear}) > 1 or clear[0].regime != "not known"
    return ", ".join(format_short(c.estimate, c.measure) + (f" {c.regime}" if several else "") for c in clear)


def _on_regimes(found: GroupFindings) -> str:
    regimes = Counter(trial.regime for trial in found.group.measured)
    if set(regimes) <= {"not known"}:
        return "It is not known whether the device or the host limited these trials: no sensor here could measure it."
    told = ", ".join(f"{number} {regime}" for regime, number in regimes.most_common())
    order = (
        "; a faster host, or a slower card, may order host-bound trials differently" if "host-bound" in regimes else ""
    )
    return f"Of these trials {told}{order}."


def _on_claims(found: GroupFindings, verdicts: Sequence[tuple[Study, Sequence[Verdict]]]) -> str:
    parts = []
    for study, judged in verdicts:
        words: dict[str, list[str]] = {}
        for verdict in judged:
            at = f" ({verdict.at})" if verdict.at else ""
            words.setdefault(verdict.verdict, []).append(f"“{verdict.says}”{at}")
        said = "; ".join(f"{verdict}: {', '.join(claims)}" for verdict, claims in words.items())
        parts.append(f"Of the claims of {study.id}, {said}.")
        if any(trial.regime == "host-bound" for trial in found.group.measured):
            parts.append(f"(Host-bound figures of this card do not predict the speed of a GPU-bound {study.card}.)")
    return " ".join(parts)


def _name(point: Point, found: GroupFindings) -> str:
    usual = usual_levels(found.points, found.design.factors)
    factors = found.design.factors
    return levels_text(point.levels, factors, usual) or levels_text(point.levels, factors, {}) or "the only point"


def _best(among: Sequence[Point], measure: Measure) -> Point:
    choose = max if measure.better is Better.higher else min
    return choose(among, key=lambda point: point.figures[measure.name][0])
