"""Test a claim that one factor's level over another changes measures, on the trials of one environment.

A ratio is claimed for some setting ("up to 25 %"), so an average over a grid cannot refute it:

- supported if at the claim's own settings (those of one of its two runs, but for the factor) the whole interval lies
  at or beyond `least_ratio`; the intervals of all such settings hold together;
- contradicted if at every setting with repeats the whole interval falls short of `least_ratio`, and the settings of
  both of its runs are among them. Bonferroni over all settings; that is conservative, since each could be
  tested by itself to refute them all (an intersection-union test, Berger 1982).

A direction is claimed for the compared runs, so only their own settings decide: all with the interval wholly on the
claimed side, or all on the other.

The GPU's own work does not depend on the host. So a claim of throughput that was made GPU-bound is tested on it, too,
wherever the study's card was not GPU-bound here.

Both rules require the whole interval to lie beyond what is to be excluded. So whatever the noise, a verdict
is wrong in at most 1 of 40 cases per measure, environment and regime. Noise only makes "undecided" more likely.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from lora_lab.report.answers.claims.cells import ClaimSetting, factor_of, settings_of
from lora_lab.report.answers.claims.study import Change, ContrastClaim, Study
from lora_lab.report.answers.claims.verdict import CONTRADICTED, SUPPORTED, Evidence, Found, ids, listed
from lora_lab.report.measures import GPU_WORK, THROUGHPUT
from lora_lab.report.statistics.blocks import regime_of
from lora_lab.report.statistics.contrasts import Contrast, contrasts
from lora_lab.report.statistics.estimates import Estimate
from lora_lab.report.writing.numbers import change, format_estimate, interval
from lora_lab.store.trials import Group, Trial

_GPU_BOUND = "GPU-bound"


def look(study: Study, claim: ContrastClaim, group: Group, name: str, speaks_in: Sequence[str] | None) -> list[Found]:
    """Return the evidence of the group, by regime.

    Args:
        name: display name of the environment.
        speaks_in: regimes whose trials count; None for all."""
    sides = [trial for trial in group.measured if trial.params.get(claim.factor) in (claim.of, claim.over)]
    if len({trial.params[claim.factor] for trial in sides}) < 2:
        return []
    by_regime = _by_regime(study, claim, claim.changes, sides)
    if not by_regime:
        text = f"{name}: no two trials of one repeat differ in {claim.factor} alone."
        seen = Evidence(text=text, place=group.place.label, regime=regime_of(sides), trials=ids(sides))
        return [Found(seen=(seen,), speaks=False, word=None)]
    found = [
        Found(
            seen=tuple(_seen(study, claim, group, name, each) for each in made),
            speaks=speaks_in is None or regime in speaks_in,
            word=_word(claim, made),
        )
        for regime, made in by_regime.items()
    ]
    return found + [
        Found(
            seen=tuple(_seen(study, claim, group, name, each) for each in made),
            speaks=study.regime == _GPU_BOUND and study.regime != regime and bool(speaks_in),
            word=_word(claim, made),
        )
        for regime, made in _by_regime(study, claim, _on_the_gpu(claim), sides).items()
    ]


def _by_regime(
    study: Study, claim: ContrastClaim, changes: Sequence[Change], sides: Sequence[Trial]
) -> dict[str, list[tuple[Change, Contrast, list[ClaimSetting]]]]:
    """Return each regime's contrast and settings for each of the changes."""
    found: dict[str, list[tuple[Change, Contrast, list[ClaimSetting]]]] = {}
    for claimed in changes:
        cells = settings_of(study, claim, sides, claimed.measure)
        for contrast in contrasts(sides, [factor_of(claim)], claimed.measure):
            inside = [cell for cell in cells if cell.regime == contrast.regime]
            found.setdefault(contrast.regime, []).append((claimed, contrast, inside))
    return found


def _on_the_gpu(claim: ContrastClaim) -> list[Change]:
    """Return what the claimed changes of throughput are for the GPU's work per token, if the host changes nothing."""
    return [
        Change(
            measure=GPU_WORK,
            sign=-claimed.sign,
            ratio=None if claimed.ratio is None else 1 / claimed.ratio,
            least_ratio=None if claimed.least_ratio is None else 1 / claimed.least_ratio,
        )
        for claimed in claim.changes
        if claimed.measure is THROUGHPUT
    ]


def _word(claim: ContrastClaim, made: Sequence[tuple[Change, Contrast, list[ClaimSetting]]]) -> str | None:
    """Return the claim's verdict: all changes have to be supported; one contradicted change contradicts the claim."""
    words = [weigh(claim, claimed, cells) for claimed, _, cells in made]
    if CONTRADICTED in words:
        return CONTRADICTED
    return SUPPORTED if len(made) == len(claim.changes) and set(words) == {SUPPORTED} else None


def weigh(claim: ContrastClaim, claimed: Change, cells: Sequence[ClaimSetting]) -> str | None:
    """Return the verdict of one regime's cells on one change (see the module); cells without repeats do not count."""
    repeated = [cell for cell in cells if cell.repeated]
    own = [cell for cell in repeated if cell.ends]
    if claimed.ratio is None:
        words = {decide(claimed, cell.difference.estimate()) for cell in own}
        return words.pop() if len(words) == 1 else None
    if any(decide(claimed, cell.difference.estimate(among=len(own))) == SUPPORTED for cell in own):
        return SUPPORTED
    if {end for cell in own for end in cell.ends} < set(claim.ends):
        return None
    refuted = all(decide(claimed, cell.difference.estimate(among=len(repeated))) == CONTRADICTED for cell in repeated)
    return CONTRADICTED if refuted else None


def decide(claimed: Change, found: Estimate) -> str | None:
    """Return what one interval says: SUPPORTED if it lies wholly at or beyond the least that was claimed (for a
    direction: on that side of 0), CONTRADICTED where wholly short of it, else None."""
    if found.low is None or found.high is None:
        return None
    low, high = sorted((claimed.sign * found.low, claimed.sign * found.high))
    if claimed.least_ratio is None:
        return SUPPORTED if low > 0 else CONTRADICTED if high < 0 else None
    least = abs(math.log(claimed.least_ratio))
    return SUPPORTED if low >= least else CONTRADICTED if high < least else None


def _seen(
    study: Study, claim: ContrastClaim, group: Group, name: str, made: tuple[Change, Contrast, list[ClaimSetting]]
) -> Evidence:
    claimed, contrast, cells = made
    return Evidence(
        text=f"{name}, {contrast.regime}: {_text(study, claim, claimed, contrast, cells)}",
        place=group.place.label,
        regime=contrast.regime,
        trials=ids(trial for cell in cells for trial in cell.trials),
        estimate=contrast.estimate,
    )


def _text(
    study: Study, claim: ContrastClaim, claimed: Change, contrast: Contrast, cells: Sequence[ClaimSetting]
) -> str:
    measure, found = contrast.measure, contrast.estimate
    over = _over(contrast, cells)
    text = f"{measure.title} with {claim.of} over {claim.over}, {over}: {format_estimate(found, measure)}"
    text += "".join(f"; {each}" for each in _at_ends(claim, claimed, cells))
    size = _size(study, claim, claimed)
    if size is not None and found.detectable is not None and found.detectable >= abs(size):
        whose = "claimed" if claimed.ratio is not None else "original's"
        text += f"; the {whose} {change(size, measure)} could have been missed"
    if contrast.also_changed:
        text += f"; what ran also differed in {listed(contrast.also_changed)}"
    return text + "."


def _over(contrast: Contrast, cells: Sequence[ClaimSetting]) -> str:
    """Return what the average is over, and how the settings differ."""
    pairs = "1 pair of trials" if contrast.pairs == 1 else f"{contrast.pairs} pairs of trials"
    if len(cells) < 2:
        return f"{pairs} in one setting of the rest"
    means = [cell.difference.value for cell in cells]
    spread = interval(Estimate(value=contrast.estimate.value, low=min(means), high=max(means)), contrast.measure)
    return f"average of {len(cells)} settings of the rest ({spread} by setting; {pairs})"


def _at_ends(claim: ContrastClaim, claimed: Change, cells: Sequence[ClaimSetting]) -> list[str]:
    """Return what was found at the settings of each of the claim's two runs."""
    # without `detectable` the change itself is written, which is what was claimed
    own = {
        run: [replace(cell.difference.estimate(), detectable=None) for cell in cells if run in cell.ends]
        for run in claim.ends
    }
    if not any(own.values()):
        return ["the settings of neither of its two runs among them"]
    return [
        f"at run {run}'s settings {listed([format_estimate(each, claimed.measure) for each in found])}"
        if found
        else f"run {run}'s settings not among them"
        for run, found in own.items()
    ]


def _size(study: Study, claim: ContrastClaim, claimed: Change) -> float | None:
    """Return the effect that trials should be able to detect, as a log ratio: the claimed one, else that between the
    middles of the study's own figures. None for what is not compared by ratios, or has no figures."""
    if claimed.ratio is not None:
        return math.log(claimed.ratio)
    name = claimed.measure.name
    runs = [study.run(run).figures for run in claim.ends]
    if not claimed.measure.ratios or any(name not in told_figures for told_figures in runs):
        return None
    over, of = (sum(told_figures[name]) for told_figures in runs)
    return math.log(of / over)
