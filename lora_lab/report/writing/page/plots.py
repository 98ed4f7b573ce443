"""Throughput against what it costs, as a picture: inline SVG, text as text, the same bytes for the same figures."""

import html
import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lora_lab.report.answers.pareto import Point
from lora_lab.report.measures import Better, Measure

_WIDTH_INCHES, _HEIGHT_INCHES = 4.2, 3.5
_TEXT = 9.5
"""Points. 4.2 in are drawn some 330 px wide on a phone: one point is about 1.1 px there."""
_SMALL = 8.5
_INK, _GREY, _LINE = "#1c2733", "#5b6670", "#c9d0d6"
_LOG_FROM = 4.0
"""Largest over smallest value from which an axis is logarithmic."""


_Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in pixels of the drawing (72 to an inch)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """How the points of a regime are drawn: Okabe and Ito's colours, and a shape besides."""

    colour: str
    shape: str
    sign: str
    """The shape as a character."""


MARKS = {
    "GPU-bound": Mark(colour="#d55e00", shape="s", sign="■"),
    "mixed": Mark(colour="#009e73", shape="D", sign="◆"),
    "host-bound": Mark(colour="#0072b2", shape="o", sign="●"),
}
_OTHER = Mark(colour="#5b6670", shape="^", sign="▲")


def mark(regime: str) -> Mark:
    """Return how a regime is drawn."""
    return MARKS.get(regime, _OTHER)


def trade_off(
    points: Sequence[Point],
    front: Sequence[Point],
    measures: tuple[Measure, Measure],
    name: Callable[[Point], str],
    salt: str = "",
) -> str:
    """Draw the first measure upward against the second: every point's median, lowest to highest of its trials, and the
    front numbered. Points without either figure are left out. `salt` separates this picture's names from those of
    others."""
    one, other = measures
    shown = [point for point in points if one.name in point.figures and other.name in point.figures]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{one.name}/{other.name}/{salt}"}):
        figure = Figure(figsize=(_WIDTH_INCHES, _HEIGHT_INCHES), layout="constrained")
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        _draw_points(axes, shown, one, other)
        _set_axis(axes.xaxis, axes.set_xscale, [point.figures[other.name][0] for point in shown])
        _set_axis(axes.yaxis, axes.set_yscale, [point.figures[one.name][0] for point in shown])
        _dress(axes, one, other)
        _draw_front(axes, front, one, other)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        _label_front(axes, shown, front, one, other, name)
        text = io.StringIO()
        canvas.print_svg(text, metadata={"Date": None})
    told = f"{one.title} against {other.title}: {len(shown)} points, {len(front)} of them on the Pareto front"
    return _inline(text.getvalue(), told)


def _draw_points(axes: Any, points: Sequence[Point], one: Measure, other: Measure) -> None:
    for point in points:
        (x, x_low, x_high), (y, y_low, y_high) = point.figures[other.name], point.figures[one.name]
        style = mark(point.regime)
        axes.plot([x_low, x_high], [y, y], color=style.colour, linewidth=0.8, alpha=0.5, zorder=2)
        axes.plot([x, x], [y_low, y_high], color=style.colour, linewidth=0.8, alpha=0.5, zorder=2)
        size = {"marker": style.shape, "markersize": 5.2 if style.shape == "o" else 4.8}
        axes.plot([x], [y], color=style.colour, markeredgecolor="white", markeredgewidth=0.6, zorder=3, **size)


def _draw_front(axes: Any, front: Sequence[Point], one: Measure, other: Measure) -> None:
    """Draw the front as a staircase: between two points only the level of the lesser is reached."""
    ends = sorted((point.figures[other.name][0], point.figures[one.name][0]) for point in front)
    if ends:
        where = "steps-post" if other.better is Better.lower else "steps-pre"
        axes.plot(*zip(*ends, strict=True), color=_INK, linewidth=1.1, drawstyle=where, zorder=1)
    for x, y in ends:
        axes.plot(
            [x], [y], "o", markersize=9, markerfacecolor="none", markeredgecolor=_INK, markeredgewidth=1, zorder=4
        )


def _set_axis(axis: Any, set_scale: Callable[[str], object], values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    if low > 0 and high / low > _LOG_FROM:
        set_scale("log")
        decades = math.log10(high / low)
        subs = (1.0, 2.0, 5.0) if decades < 2.2 else (1.0,)
        axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(nbins=5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _dress(axes: Any, one: Measure, other: Measure) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_LINE)
    axes.grid(color="#e7ebee", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_GREY, labelsize=_SMALL, length=0, pad=4)
    axes.margins(0.09)
    axes.set_xlabel(_axis_title(other), fontsize=_TEXT, color=_INK)
    axes.set_ylabel(_axis_title(one), fontsize=_TEXT, color=_INK)


def _axis_title(measure: Measure) -> str:
    better = "better →" if measure.better is Better.higher else "← better"
    return f"{measure.title}, {measure.unit} ({better})"


def _label_front(
    axes: Any,
    points: Sequence[Point],
    front: Sequence[Point],
    one: Measure,
    other: Measure,
    name: Callable[[Point], str],
) -> None:
    """Label points with number and name if there is room, else with the number; labels never overlap."""
    pixels = axes.transData.transform([(p.figures[other.name][0], p.figures[one.name][0]) for p in points])
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in pixels]
    ends = sorted((p.figures[other.name][0], p.figures[one.name][0]) for p in front)
    taken += _stairs([tuple(axes.transData.transform(end)) for end in ends], other)
    inside = axes.get_window_extent()
    box = (inside.x0 + 2, inside.y0, axes.figure.bbox.x1 - 2, inside.y1 + 6)
    for index, point in enumerate(front, 1):
        x, y = axes.transData.transform((point.figures[other.name][0], point.figures[one.name][0]))
        for text in (f"{index} {name(point)}", str(index)):
            place = _free_place(x, y, text, taken, box)
            if place is not None:
                left, bottom, _, top = place
                taken.append(place)
                at = axes.transData.inverted().transform((left, bottom + 0.25 * (top - bottom)))
                axes.text(*at, text, fontsize=_SMALL, color=_INK, weight="bold" if text == str(index) else "normal")
                break


def _stairs(ends: Sequence[tuple[float, float]], other: Measure) -> list[_Box]:
    """Return the path of the front's line, in pixels."""
    boxes = []
    for (x, y), (next_x, next_y) in itertools.pairwise(ends):
        level, turn = (y, next_x) if other.better is Better.lower else (next_y, x)
        boxes.append((x, level - 1, next_x, level + 1))
        boxes.append((turn - 1, min(y, next_y), turn + 1, max(y, next_y)))
    return boxes


def _free_place(
    x: float,
    y: float,
    text: str,
    taken: Sequence[_Box],
    box: _Box,
) -> _Box | None:
    """Return a place next to, above or below (x, y): left and above first, where a front of more for less leaves
    room."""
    width, height = 0.6 * _SMALL * len(text), 1.15 * _SMALL
    sides = [
        (x - 9 - width, y - height / 2),
        (x - 5 - width, y + 7),
        (x + 9, y - height / 2),
        (x + 5, y + 7),
        (x + 5, y - 7 - height),
        (x - 5 - width, y - 7 - height),
    ]
    for left, bottom in sides:
        place = (left, bottom, left + width, bottom + height)
        within = place[0] >= box[0] and place[1] >= box[1] and place[2] <= box[2] and place[3] <= box[3]
        if within and not any(_overlap(place, other) for other in taken):
            return place
    return None


def _overlap(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _inline(svg: str, told: str) -> str:
    """Make it fit to embed in a page: no prolog, no size of its own, the page's font, no names that could clash."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"font: (?:bold )?([\d.]+)px [^;\"]+", _font, svg)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    opening = re.search(r'viewBox="[^"]+"', svg)
    assert opening is not None
    head = f'<svg class="plot" role="img" aria-label="{html.escape(told)}" {opening[0]}>'
    return head + svg[svg.index(">") + 1 :].strip()


def _font(found: re.Match[str]) -> str:
    weight = "font-weight: 600; " if "bold" in found[0] else ""
    return f"{weight}font-size: {found[1]}px"
