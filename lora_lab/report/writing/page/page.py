"""The findings as one page of HTML that needs nothing else: no network, no script, no font."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from lora_lab.quality.answer_rows import AnswerRow
from lora_lab.report.answers.fits import Fit
from lora_lab.report.answers.pareto import Point
from lora_lab.report.findings import Findings, Fitted, GroupFindings
from lora_lab.report.measures import KNOWN, LOSS, MEASURES, THROUGHPUT, Measure
from lora_lab.report.statistics.attribution import Split
from lora_lab.report.statistics.factorial import FactorialModel
from lora_lab.report.statistics.factors import Factor
from lora_lab.report.writing import contenders
from lora_lab.report.writing.effects import dropped, real, real_contrasts, rows
from lora_lab.report.writing.estimates import estimate_sentences
from lora_lab.report.writing.headline import command, confounded, is_about_quality, notes, question, sentences
from lora_lab.report.writing.labels import (
    count,
    level_text,
    levels_text,
    machine_names,
    outcome_text,
    regime_text,
    usual_levels,
)
from lora_lab.report.writing.learnt import front_sentences, is_compared, ordered
from lora_lab.report.writing.numbers import change, format_estimate
from lora_lab.report.writing.page.answer_cards import answer_cards
from lora_lab.report.writing.page.heat_map import HeatMap, heat_map
from lora_lab.report.writing.page.intervals import Bars, forests, waterfall
from lora_lab.report.writing.page.plots import mark, trade_off
from lora_lab.report.writing.page.timelines import HEIGHT, WIDTH, Series, Timeline, timeline
from lora_lab.store.trials import Trial

_ROWS = 8
"""Lines of the small table at the top."""
_FOLD_FROM = 12
_OPEN_UP_TO = 3
"""Timelines are unfolded when there are no more trials than this."""

Timelines = Mapping[str, Mapping[str, Series]]
"""By run id, then by series key."""

Answers = Mapping[str, Sequence[AnswerRow]]
"""By run id."""

_FEWEST_DRAWN = 3
"""Trials from which loss against cost is drawn."""

_ANSWERS = 8
"""Of a point that are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One measure against another."""

    svg: Markup
    regimes: tuple[tuple[str, str, str], ...]
    """Sign, colour and name."""
    front: tuple[tuple[str, str, str], ...]
    """Name and both figures of each point of the front."""
    others: int
    """Points that are drawn and not on the front."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """The timelines of one point."""

    label: str
    trials: tuple[tuple[Trial, Timeline | None], ...]

    @property
    def drawn(self) -> int:
        """Return how many trials have a timeline."""
        return sum(line is not None for _, line in self.trials)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One environment's findings, ready to be rendered."""

    found: GroupFindings
    machine: str
    usual: Mapping[str, str]
    """Levels that names of points leave out."""
    sure: str
    one_point: Point | None
    maps: tuple[HeatMap, ...]
    pictures: tuple[Picture, ...]
    """Throughput against what it costs."""
    quality: tuple[Picture, ...]
    """Held-out loss against what it costs."""
    forests: tuple[tuple[Measure, tuple[Bars, ...]], ...]
    models: tuple[tuple[str, tuple[Fitted, ...]], ...]
    """By measure name."""
    splits: tuple[tuple[Split, Bars | None, str], ...]
    """With the regimes of their corners, in words."""
    budgets: tuple[float, ...]
    fits: tuple[tuple[str, tuple[Fit | None, ...]], ...]
    folders: tuple[Folder, ...]
    answers: tuple[tuple[str, tuple[AnswerRow, ...]], ...]
    """The first answers of a trial of each point, by its name."""
    environment: tuple[tuple[str, str], ...]

    def name(self, levels: Mapping[str, str]) -> str:
        """Return a point's name."""
        return _name(levels, self.found.design.factors, self.usual)

    @property
    def many(self) -> bool:
        """Return whether there are enough points to fold up their list, too."""
        return len(self.folders) > _FOLD_FROM

    @property
    def open(self) -> bool:
        """Return whether timelines are few enough to be unfolded."""
        return sum(len(folder.trials) for folder in self.folders) <= _OPEN_UP_TO


def write_page(findings: Findings, timelines: Timelines, path: Path, answers: Answers | None = None) -> None:
    """Write `page` to `path`."""
    path.write_text(page(findings, timelines, answers), encoding="utf-8")


def page(findings: Findings, timelines: Timelines, answers: Answers | None = None) -> str:
    """Return the whole page.

    `timelines` holds the step times (s) and power (W) to draw: Unix time in ms, step and value. Trials that it lacks
    are shown without timelines. `answers` holds the trials' answers to held-out prompts."""
    loader = PackageLoader("lora_lab.report.writing.page", "")
    environment = Environment(
        loader=loader,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "typeset": typeset,
        "outcome": outcome_text,
        "breaks": breaks,
        "regime": regime_text,
        "first_sentence": first_sentence,
        "small_unit": small_unit,
        "upper_first": lambda text: text[:1].upper() + text[1:],
    }
    environment.globals |= {
        "count": count,
        "format_estimate": format_estimate,
        "change": change,
        "level_text": level_text,
        "real": real,
        "dropped": dropped,
        "confounded": confounded,
        "estimate_sentences": estimate_sentences,
        "is_compared": is_compared,
        "ordered": ordered,
        "front_sentences": front_sentences,
        "answers_shown": _ANSWERS,
        "contenders": contenders,
        "is_model": lambda model: isinstance(model, FactorialModel),
    }
    css, _, _ = loader.get_source(environment, "page.css")
    names = machine_names([(found.group.place, found.kind) for found in findings.groups])
    parts = [
        _part(found, timelines, answers or {}, number, name)
        for number, (found, name) in enumerate(zip(findings.groups, names, strict=True))
    ]
    return environment.get_template("page.html.j2").render(
        findings=findings,
        question=question(findings),
        cards=answer_cards(findings),
        command=command(findings),
        sentences=sentences(findings),
        rows=rows(findings.groups[0], _ROWS),
        notes=notes(findings),
        parts=parts,
        css=Markup(css),
        measures={measure.name: measure for measure in KNOWN},
        panel_size=(WIDTH, HEIGHT),
        symbols={"supported": "✓", "contradicted": "✗", "confounded in the original": "≠", "not testable here": "?"},
    )


def typeset(text: str) -> str:
    """Set true minus and multiplication signs in figures: "-0.5 %" and "x7.31", but not "bf16-2" or "2x512"."""
    text = re.sub(r"(?<![\w.-])-(?=\d)", "\N{MINUS SIGN}", text)
    text = re.sub(r"(?<!\w)x(?=\d)", "\N{MULTIPLICATION SIGN}", text)
    return re.sub(r"(?<=\d) (?=%|GiB\b|J/token|tokens/s)", "\N{NO-BREAK SPACE}", text)


def small_unit(text: str) -> Markup:
    """Return a figure with its unit in small type: "15,548 tokens/s"."""
    number, space, unit = text.replace("\N{NO-BREAK SPACE}", " ").partition(" ")
    return Markup("{}{}<small>{}</small>").format(number, space, unit)


def first_sentence(text: str) -> str:
    """Return a text up to the end of its first sentence or clause: a stop or a semicolon before a space."""
    first = re.split(r"(?<=[a-z)\d])[.;] (?=\S)", text, maxsplit=1)[0]
    return first if first.endswith(".") else f"{first}."


def breaks(text: str) -> Markup:
    """Text whose long settings may be broken after "_", "=", "." and "/", but only where they don't fit on a line."""
    words = [re.sub(r"(?<=\w[_=./])(?=\w)", "<wbr>", str(escape(word))) for word in text.split(" ")]
    return Markup(" ".join(f'<span class="word">{word}</span>' if "<wbr>" in word else word for word in words))


def _part(found: GroupFindings, timelines: Timelines, answers: Answers, number: int, machine: str) -> Part:
    factors, points = found.design.factors, found.points
    usual = usual_levels(points, factors)
    budgets = tuple(dict.fromkeys(fit.budget_gib for fit in found.fits))
    drawn = [(measure, tuple(forests(real_contrasts(found), found.compared, measure))) for measure in MEASURES]
    return Part(
        found=found,
        machine=machine,
        usual=usual,
        sure=_how_sure(found),
        one_point=points[0] if len(points) == 1 else None,
        maps=tuple(heat_map(points, factors, m) for m in _mapped(found)) if len(points) > 1 else (),
        pictures=tuple(_pictures(found, usual, number)),
        quality=tuple(_quality_pictures(found, usual, number)),
        forests=tuple((measure, bars) for measure, bars in drawn if bars),
        models=tuple(
            (measure.name, tuple(each for each in found.models if each.measure is measure))
            for measure in MEASURES
            if any(each.measure is measure for each in found.models)
        ),
        splits=tuple((split, waterfall(split), _regimes_text(split.regimes)) for split in found.splits),
        budgets=budgets,
        fits=tuple(_fits_by_others(found.fits, budgets)),
        folders=tuple(_folders(found, factors, usual, timelines)),
        answers=tuple(_answers(found, factors, usual, answers)),
        environment=tuple(_environment(found)),
    )


def _mapped(found: GroupFindings) -> list[Measure]:
    """Return the measures that have a map, first what the report is about."""
    shown = found.shown or [THROUGHPUT]
    return sorted(shown, key=lambda measure: measure is not LOSS) if is_about_quality(found) else shown


def _how_sure(found: GroupFindings) -> str:
    """Return how many trials there are, in which regimes, and how often they were repeated."""
    measured = found.group.measured
    each = sorted({sum(t.finished for t in point.trials) for point in found.points if point.figures})
    if not each:
        return "No trial finished with figures that can be compared."
    regimes = Counter(trial.regime for trial in measured)
    if set(regimes) == {"not known"}:
        spread = "regime not known (no sensor here could measure it)"
    else:
        spread = ", ".join(f"{number} {regime}" for regime, number in regimes.most_common())
    ran = f"{each[0]}" if len(each) == 1 else f"{each[0]} to {each[-1]}"
    repeats = f"{ran} per point" if len(found.points) > 1 else ""
    sure = "" if each[-1] > 1 else "; without repeats the uncertainty of a figure is not known"
    intervals = "; intervals are 95 %" if found.contrasts and not sure else ""
    measured_text = count(len(measured), "measured trial") + (f", {repeats}" if repeats else "")
    return f"{measured_text}: {spread}{intervals}{sure}."


def _name(levels: Mapping[str, str], factors: Sequence[Factor], usual: Mapping[str, str]) -> str:
    return levels_text(levels, factors, usual) or levels_text(levels, factors, {}) or "the only point"


def _regimes_text(regimes: Mapping[str, str]) -> str:
    if len(set(regimes.values())) == 1:
        return f"All points used here: {regime_text(next(iter(regimes.values())))}."
    return "Regimes: " + "; ".join(f"{corner} {regime}" for corner, regime in regimes.items()) + "."


def _pictures(found: GroupFindings, usual: Mapping[str, str], number: int) -> list[Picture]:
    made = []
    for measure in MEASURES:
        front = found.fronts.get(measure.name, ())
        both = [p for p in found.points if THROUGHPUT.name in p.figures and measure.name in p.figures]
        if front and len(both) > 1:
            made.append(_picture(found, both, front, (THROUGHPUT, measure), usual, number))
    return made


def _quality_pictures(found: GroupFindings, usual: Mapping[str, str], number: int) -> list[Picture]:
    """Return a picture for each front of loss; none where too few trials finished to look at."""
    if len(found.group.measured) < _FEWEST_DRAWN:
        return []
    made = []
    for each in found.quality:
        both = [point for point, standing in zip(found.points, each.standings, strict=True) if standing is not None]
        front = sorted((found.points[place] for place in each.places), key=lambda point: point.figures[LOSS.name][0])
        made.append(_picture(found, both, front, (LOSS, each.cost), usual, number))
    return made


def _picture(
    found: GroupFindings,
    points: Sequence[Point],
    front: Sequence[Point],
    measures: tuple[Measure, Measure],
    usual: Mapping[str, str],
    number: int,
) -> Picture:
    def name(point: Point) -> str:
        return _name(point.levels, found.design.factors, usual)

    one, other = measures
    regimes = [(mark(r).sign, mark(r).colour, r) for r in dict.fromkeys(point.regime for point in points)]
    told = [(name(p), one.write(p.figures[one.name][0]), other.write(p.figures[other.name][0])) for p in front]
    return Picture(
        svg=Markup(trade_off(points, front, measures, name, salt=str(number))),
        regimes=tuple(regimes),
        front=tuple(told),
        others=len(points) - len(front),
    )


def _fits_by_others(fits: Sequence[Fit], budgets: Sequence[float]) -> list[tuple[str, tuple[Fit | None, ...]]]:
    table: dict[str, dict[float, Fit]] = {}
    for fit in fits:
        table.setdefault(fit.others, {})[fit.budget_gib] = fit
    return [(others, tuple(row.get(budget) for budget in budgets)) for others, row in table.items()]


def _folders(
    found: GroupFindings, factors: Sequence[Factor], usual: Mapping[str, str], timelines: Timelines
) -> list[Folder]:
    by_point = [(_name(p.levels, factors, usual), p.trials) for p in found.points]
    shown = {trial.run_id for _, trials in by_point for trial in trials}
    rest = tuple(each.trial for each in found.group.excluded if each.trial.run_id not in shown)
    return [
        Folder(label=label, trials=tuple((trial, timeline(trial, timelines.get(trial.run_id, {}))) for trial in trials))
        for label, trials in [*by_point, *([("left out", rest)] if rest else [])]
    ]


def _answers(
    found: GroupFindings, factors: Sequence[Factor], usual: Mapping[str, str], answers: Answers
) -> list[tuple[str, tuple[AnswerRow, ...]]]:
    """Return the answers of each point's last trial that has some."""
    made = []
    for point in found.points:
        having = [rows for trial in point.trials if (rows := answers.get(trial.run_id))]
        if having:
            made.append((_name(point.levels, factors, usual), tuple(having[-1][:_ANSWERS])))
    return made


def _changes_text(dirty: bool, tags: Sequence[Mapping[str, str]]) -> str:
    if dirty:
        return "yes: the code that ran is not in any commit"
    return "none" if all("dirty" in each for each in tags) else "not recorded"


def _environment(found: GroupFindings) -> list[tuple[str, str]]:
    """Return the environment that the trials recorded; several values if they differ."""
    group, place = found.group, found.group.place
    tags = [trial.tags for trial in (*group.trials, *(each.trial for each in group.excluded))]

    def values(key: str, unit: str = "") -> str:
        told_values = dict.fromkeys(each[key] + unit for each in tags if key in each)
        return ", ".join(told_values) or "not recorded"

    host = [("cores", "machine.cpu_count", ""), ("memory", "machine.memory_gib", " GiB"), ("OS", "machine.os", "")]
    return [
        ("device", place.device),
        ("device memory", values("device.memory_gib", " GiB")),
        ("device id", place.unit),
        ("driver", values("device.driver")),
        ("versions", place.versions or "not recorded"),
        ("Python", values("version.python")),
        ("lora_lab", values("version.lora_lab")),
        ("commit", values("commit")),
        ("code digest", place.code),
        ("uncommitted changes", _changes_text(place.dirty, tags)),
        ("host", values("process.host")),
        ("CPU", values("machine.cpu")),
        *((name, values(key, unit)) for name, key, unit in host),
    ]
