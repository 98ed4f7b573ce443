"""What is said of the estimates of memory: how far off they were, and which verdicts were wrong."""

from collections.abc import Sequence

from lora_lab.report.findings import GroupFindings
from lora_lab.report.writing.labels import count
from lora_lab.report.writing.point_names import point_text

_NAMED = 6
"""Points that a sentence names."""


def estimate_sentences(found: GroupFindings) -> list[str]:
    """Return what became of the estimates of memory, in sentences; none where no record has one."""
    answer = found.estimates
    if answer is None:
        return []
    said = []
    if (errors := answer.errors) is not None:
        where = point_text(found.points[errors.worst_at], found)
        within = "" if errors.within is None else f"; {errors.within} of {errors.trials} were within the interval"
        said.append(
            f"The {errors.of.title} was off by {100 * errors.mean:.1f} % on average and by {100 * errors.worst:+.1f} % "
            f"at most ({where}), over {count(errors.trials, 'trial')}{within}."
        )
    for places, words in (
        (answer.fits_but_ran_out, "Estimated to fit, but ran out of memory"),
        (
            answer.ran_out_elsewhere,
            "Estimated to fit, but ran out of memory in an evaluation or in another phase that is not estimated",
        ),
        (answer.too_large_but_finished, "Estimated to be too large, but finished"),
    ):
        if places:
            said.append(f"{words}: {_listed([point_text(found.points[place], found) for place in places])}.")
    said += [
        f"{count(number, 'estimate')} cannot be compared with what was measured: {why}."
        for why, number in answer.apart.items()
    ]
    return said


def _listed(names: Sequence[str]) -> str:
    more = [f"and {len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return ", ".join([*names[:_NAMED], *more])
