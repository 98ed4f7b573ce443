"""The cards that a page begins with: what to use, what it learnt, what mattered, how sure that is."""

from dataclasses import dataclass

from lora_lab.report.findings import Findings, GroupFindings
from lora_lab.report.measures import HOURS, LOSS, THROUGHPUT
from lora_lab.report.statistics.kinds import Kind
from lora_lab.report.writing.effects import Effect, effects
from lora_lab.report.writing.headline import fastest_point, is_about_quality, most_repeats
from lora_lab.report.writing.labels import count
from lora_lab.report.writing.learnt import best_learnt, is_compared, no_worse, ordered
from lora_lab.report.writing.numbers import change, is_absurd
from lora_lab.report.writing.point_names import point_text

_EFFECTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerCard:
    """One number with what it is about."""

    title: str
    big: str
    about: str
    lines: tuple[str, ...]


def answer_cards(findings: Findings) -> tuple[AnswerCard, ...]:
    """Return the cards of the machine with most trials; none where no trial has figures."""
    main = findings.groups[0]
    best = fastest_point(main)
    if best is None:
        return ()
    shown = sorted(main.shown, key=lambda measure: measure is not HOURS) if main.kind is Kind.job else main.shown
    figures = [measure.write(best.figures[measure.name][0]) for measure in shown if measure.name in best.figures]
    title = "Highest median" if findings.answers else "Fastest" if is_compared(main) else "Use"
    use = AnswerCard(
        title="What it takes" if len(main.points) == 1 else title,
        big=figures[0],
        about=point_text(best, main),
        lines=tuple(figures[1:]),
    )
    learns = (_learns(main),) if is_compared(main) else ()
    first = (*learns, use) if is_about_quality(main) else (use, *learns)
    return *first, _mattered(main), _how_sure(main, bool(findings.answers))


def _learns(found: GroupFindings) -> AnswerCard:
    """Return the card of the configuration that learnt best, with how many others the held-out rows cannot tell from
    the lowest loss."""
    point, answer = best_learnt(found)
    figures = [
        measure.write(point.figures[measure.name][0]) for measure in found.shown if measure.name in point.figures
    ]
    lowest, its, _ = ordered(found)[0]
    if lowest is point:
        others = no_worse(found)
    else:
        others = f"{point_text(lowest, found)}: {LOSS.form.format(its.loss)}, longer, and not seen to be better"
    return AnswerCard(
        title="Held-out loss of the best, nats per token",
        big=LOSS.form.format(answer.loss),
        about=point_text(point, found),
        lines=(others, *(text for text in figures if text != LOSS.write(answer.loss))),
    )


def _mattered(found: GroupFindings) -> AnswerCard:
    there = effects(found)
    made = [each for each in there if not each.is_judged and not is_absurd(each.main.estimate, THROUGHPUT)]
    if any(each.is_judged for each in there) and not made:
        return AnswerCard(title="What mattered", big="see above", about="the answer of repeats=auto", lines=())
    if not made:
        why = "nothing to compare with yet" if len(found.points) == 1 else "no effect can be named"
        return AnswerCard(title="What mattered", big="nothing yet", about=why, lines=())
    first, *rest = made
    return AnswerCard(
        title="What mattered for speed",
        big=_size(first),
        about=_about(first),
        lines=tuple(f"{_about(effect)}: {_size(effect)}" for effect in rest[: _EFFECTS - 1]),
    )


def _about(effect: Effect) -> str:
    regime = effect.main.regime
    return f"{effect.of} instead of {effect.over}" + ("" if regime == "not known" else f", {regime}")


def _size(effect: Effect) -> str:
    found = effect.main.estimate
    return "none seen" if found.seen is False else change(found.value, THROUGHPUT)


def _how_sure(found: GroupFindings, is_judged: bool) -> AnswerCard:
    repeats = most_repeats(found)
    rated = sum(THROUGHPUT.name in point.figures for point in found.points)
    lines = [f"on {found.group.place.device}, not on other cards or hosts"]
    if repeats > 1 and rated > 1 and not is_judged:
        verb = "is" if found.as_fast == 1 else "are"
        lines.insert(
            0, f"{found.as_fast or 'none'} of {count(rated - 1, 'other')} {verb} as fast, as far as this can show"
        )
    about = (
        f"at most per configuration{'' if is_judged else '; intervals are 95 %'}"
        if repeats > 1
        else "nothing was repeated: the order may be chance"
    )
    return AnswerCard(title="How sure", big=count(repeats, "repeat"), about=about, lines=tuple(lines))
