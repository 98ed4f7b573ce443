"""Judge a paper's claims by the available trials.

Only trials with the settings that all of the study's runs share are used. Each environment and regime is judged
separately.

What counts: for a claim with `evidence: same_card` only trials on the study's card (its name as the driver gives it)
in the study's regime; for `any_card` all of them. Evidence from other trials is listed, but is not decisive.

Who decides: contrast.py for one factor's level over another, memory.py for what fits, association.py for more of one
measure with less of another.

If environments or regimes that count disagree, a claim about any card is contradicted (one counterexample is enough),
and one about a single card stays undecided. What is undecided is "confounded in the original" if the study's own runs
alias the claim's factor with others (by rank), else "not testable here".
"""

from collections.abc import Iterable, Mapping, Sequence

from lora_lab.report.answers.claims import association, contrast
from lora_lab.report.answers.claims.contrast import decide
from lora_lab.report.answers.claims.memory import judge_fits
from lora_lab.report.answers.claims.required_effect import Needed, needed
from lora_lab.report.answers.claims.study import ANY_CARD, AssociationClaim, Claim, ContrastClaim, FitsClaim, Study
from lora_lab.report.answers.claims.study_file import load_study, shipped
from lora_lab.report.answers.claims.verdict import (
    CONFOUNDED,
    CONTRADICTED,
    NOT_TESTABLE,
    SUPPORTED,
    Evidence,
    Found,
    Verdict,
    has_settings,
    listed,
    place_names,
)
from lora_lab.report.statistics.factors import tied
from lora_lab.store.trials import Group

__all__ = [
    "CONFOUNDED",
    "CONTRADICTED",
    "NOT_TESTABLE",
    "SUPPORTED",
    "Evidence",
    "Needed",
    "Study",
    "Verdict",
    "decide",
    "judge",
    "load_study",
    "needed",
    "shipped",
]


def judge(study: Study, groups: Sequence[Group]) -> list[Verdict]:
    """Judge every claim of the study."""
    ours = [narrowed for group in groups if (narrowed := narrow(group, study.held)).trials]
    return [_judge(study, claim, ours) for claim in study.claims]


def narrow(group: Group, settings: Mapping[str, str]) -> Group:
    """Return the group with only the trials that have these settings."""
    return Group(
        place=group.place,
        trials=tuple(trial for trial in group.trials if has_settings(trial, settings)),
        measured=tuple(trial for trial in group.measured if has_settings(trial, settings)),
        excluded=tuple(each for each in group.excluded if has_settings(each.trial, settings)),
    )


def _judge(study: Study, claim: Claim, groups: Sequence[Group]) -> Verdict:
    if isinstance(claim, FitsClaim):
        return judge_fits(study, claim, groups)
    names = place_names(groups)
    found = [each for group in groups for each in _look(study, claim, group, names[group.place])]
    speaking = [each for each in found if each.speaks]
    words = {each.word for each in speaking if each.word is not None}
    if len(words) == 1 or (words and claim.evidence == ANY_CARD):
        word = CONTRADICTED if CONTRADICTED in words else SUPPORTED
        meaning = [association.meaning(claim)] if isinstance(claim, AssociationClaim) else []
        because = _because(each for each in speaking if each.word == word)
        why = " ".join([because, *meaning, *_besides(speaking, word)])
        told = dict.fromkeys(seen.regime for each in speaking if each.word == word for seen in each.seen)
        at = f"{' and '.join(told)} only" if any(each.word != word for each in speaking) else ""
    else:
        (word, why), at = _undecided(study, claim, speaking), ""
    return Verdict(
        claim=claim.id,
        says=claim.says,
        verdict=word,
        why=why,
        original=_original(study, claim),
        seen=tuple(seen for each in found for seen in each.seen),
        at=at,
        settle=claim.settle,
    )


def _because(found: Iterable[Found]) -> str:
    return " ".join(seen.text for each in found for seen in each.seen)


def _besides(speaking: Sequence[Found], word: str) -> list[str]:
    """Return where else it was tested, with another result or none."""
    said = []
    for others, how in (({None}, "Undecided"), ({SUPPORTED, CONTRADICTED} - {word}, "Otherwise")):
        places = [seen.text.partition(":")[0] for each in speaking if each.word in others for seen in each.seen]
        if places:
            said.append(f"{how}: {'; '.join(dict.fromkeys(places))}.")
    return said


def _undecided(study: Study, claim: Claim, speaking: Sequence[Found]) -> tuple[str, str]:
    """Return the verdict if no trials are decisive, and why."""
    words = {each.word for each in speaking} - {None}
    where = "" if claim.evidence == ANY_CARD else f" {study.regime} on {study.card}"
    if not speaking:
        lack = f"No available trial tests it{where}"
        lack += "; other trials are listed, but are not decisive." if where else "."
    else:
        lack = f"The trials{where} {'disagree' if words else 'are not decisive'}: {_because(speaking)}"
    others = _tied_with(study, claim)
    if not others:
        return NOT_TESTABLE, lack
    return (
        CONFOUNDED,
        f"Its own runs cannot separate {_factor(claim)} from {listed(others)} (aliased in their design). {lack}",
    )


def _factor(claim: Claim) -> str:
    return claim.factor if isinstance(claim, ContrastClaim) else ""


def _tied_with(study: Study, claim: Claim) -> list[str]:
    """Return the settings that are aliased with the claim's factor in the study's own runs."""
    groups = tied([study.settings(run.name) for run in study.runs])
    return [name for group in groups if _factor(claim) in group for name in group if name != _factor(claim)]


def _original(study: Study, claim: Claim) -> str:
    said = []
    if isinstance(claim, ContrastClaim):
        said.append(_changed(study, claim))
    if isinstance(claim, AssociationClaim):
        said.append(_product(study, claim))
    return " ".join(text for text in [*said, claim.remark] if text)


def _changed(study: Study, claim: ContrastClaim) -> str:
    start, end = (study.settings(run) for run in claim.ends)
    keys = [key for key in dict.fromkeys([*start, *end]) if start.get(key) != end.get(key)]
    moves = [f"{key} ({start.get(key, 'not stated')} to {end.get(key, 'not stated')})" for key in keys]
    between = f"between its runs {claim.ends[0]} and {claim.ends[1]}"
    if keys == [claim.factor]:
        return f"Nothing but {moves[0]} changed {between}."
    return f"{len(keys)} settings changed at once {between}: {listed(moves)}."


def _product(study: Study, claim: AssociationClaim) -> str:
    """Return a note if the product of both measures is constant in all of the study's runs."""
    names = (claim.more.name, claim.less.name)
    both = [[run.figures[name] for name in names] for run in study.runs if {*names} <= run.figures.keys()]
    products = [[more[end] * less[end] for more, less in both] for end in (0, 1)]
    if len(both) < 2 or any(max(each) > 1.05 * min(each) for each in products):
        return ""
    low, high = (sum(each) / len(each) for each in products)
    ends = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
    return (
        f"In all of its {len(both)} runs {claim.more.title} x {claim.less.title} is {ends} within 5 %: one follows "
        "from the other."
    )


def _look(study: Study, claim: Claim, group: Group, name: str) -> list[Found]:
    speaks_in = None
    if claim.evidence != ANY_CARD:
        speaks_in = [study.regime] if group.place.device == study.card else []
    if isinstance(claim, ContrastClaim):
        return contrast.look(study, claim, group, name, speaks_in)
    return association.look(claim, group, name, speaks_in) if isinstance(claim, AssociationClaim) else []
