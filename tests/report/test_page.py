"""report.html: one page, self-contained, with every section that its trials have something to say in."""

import dataclasses
import itertools
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import trial

from lora_lab.report.answers.claims.study_file import SHIPPED, load_study
from lora_lab.report.findings import Findings, Question, find
from lora_lab.report.writing.headline import sentences
from lora_lab.report.writing.page.heat_map import colour
from lora_lab.report.writing.page.page import Timelines, page, typeset, write_page
from lora_lab.report.writing.page.timelines import POWER_WATTS, STEP_SECONDS, timeline
from lora_lab.store.trials import Trial

_VOID = {"meta", "br", "wbr", "hr", "img", "input", "link", "path", "rect", "use"}
_INLINE = {"wbr", "span"}
_REASON = {"absent.energy/joules_per_token": "no power readings: this is a CPU"}


class _Page(HTMLParser):
    """Elements, text and references of a page; fails on a tag that closes nothing."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.words += "" if tag in _INLINE else " "
        told = dict(attrs)
        self.references += [told[key] or "" for key in ("src", "href", "xlink:href", "srcset", "action") if key in told]
        self.ids += [told["id"] or ""] if "id" in told else []
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        self.words += "" if tag in _INLINE else " "
        if tag not in _VOID:
            assert self.open
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.words += data

    @property
    def text(self) -> str:
        return re.sub(r"[ \n]+", " ", self.words)


def _factorial(repeats: int = 2, **settings: str) -> list[Trial]:
    """Two optimizers by two precisions by two shapes: bf16 3 % faster, 2x512 1.8 times, noise of 0.5 %."""
    noise = random.Random(7)
    made = []
    for repeat, optimizer, precision, batch in itertools.product(
        range(repeats), ("adamw", "paged_adamw"), ("fp16", "bf16"), ("1", "2")
    ):
        speed = 1000.0 * (1.03 if precision == "bf16" else 1) * (1.8 if batch == "2" else 1)
        speed *= math.exp(noise.gauss(0, 0.005))
        figures = {
            "throughput/tokens_per_second": speed,
            "energy/joules_per_token": 100 / speed + 0.01 * noise.random(),
            "vram/peak_device_gib": 6.0 + int(batch) + (optimizer == "adamw") * 0.1,
        }
        chosen = {"optimizer": optimizer, "precision": precision, "batch_size": batch} | settings
        made.append(trial(figures, repeat=repeat, **chosen))
    return made


def _lines(trials: list[Trial]) -> Timelines:
    begun = 1_700_000_000_000
    steps = [(begun + 500 * n, n, 0.5 + 0.01 * (n % 3)) for n in range(1, 12)]
    power = [(begun + 50 * n, n, 100.0 + n % 40) for n in range(120)]
    return {each.run_id: {STEP_SECONDS: steps, POWER_WATTS: power} for each in trials}


def _find(trials: list[Trial], *, claims: bool = False) -> Findings:
    studies = tuple(load_study(path) for path in sorted(SHIPPED.glob("*.yaml"))) if claims else ()
    return find(trials, [], Question(studies=studies), "1.2.3")


def test_a_factorial_fills_every_section() -> None:
    trials = [*_factorial(), trial(outcome="killed", tags={"reason": "interrupted"}, batch_size="2")]
    trials.append(
        trial({"out_of_memory/asked_gib": 2.25}, outcome="out_of_memory", optimizer="adamw", batch_size="4", repeat=0)
    )
    findings = _find(trials, claims=True)
    read = _Page(page(findings, _lines(trials)))
    for sentence in sentences(findings):
        assert typeset(sentence) in read.text
    for said in (
        "out of memory",
        "asked for 2.25 GiB more",
        "Pareto front",
        "fp16 over bf16",
        "interrupted",
        "not tried",
    ):
        assert said in read.text, said
    assert read.tags.count("svg") >= 2 + len(trials)
    for _, verdicts in findings.verdicts:
        for verdict in verdicts:
            assert verdict.verdict in read.text
            assert verdict.settle in read.text
    assert findings.commands[-1] in read.text


def test_one_trial_gives_its_figures_and_no_empty_pictures() -> None:
    alone = trial({"throughput/tokens_per_second": 1234.0}, sweep=None, tags=_REASON)
    read = _Page(page(_find([alone]), {}))
    assert "1,234 tokens/s" in read.text
    assert "nothing to compare it with" in read.text
    assert "this is a CPU" in read.text
    assert "No trial kept step times or power readings" in read.text
    assert "svg" not in read.tags
    assert "Pareto" not in read.text


def test_trials_on_a_cpu_have_no_pictures_of_memory_and_energy_but_the_reason() -> None:
    trials = [
        trial({"throughput/tokens_per_second": speed}, regime=None, tags=_REASON, device="cpu", batch_size=batch)
        for speed, batch in ((90.0, "1"), (130.0, "2"))
    ]
    read = _Page(page(_find(trials), {}))
    assert "this is a CPU" in read.text
    assert "regime not known" in read.text
    assert "Pareto" not in read.text
    assert "svg" not in read.tags


def test_a_sweep_of_which_nothing_ran_to_the_end_says_how_trials_ended() -> None:
    trials = [
        trial({"out_of_memory/asked_gib": float(batch)}, outcome="out_of_memory", batch_size=batch) for batch in "48"
    ]
    read = _Page(page(_find(trials), {}))
    assert "asked for 4.00 GiB more" in read.text
    assert "asked for 8.00 GiB more" in read.text
    assert "No trial finished with figures" in read.text


def test_only_killed_trials_are_left_out_by_name() -> None:
    read = _Page(page(_find([trial(outcome="killed", tags={"reason": "Ctrl-C"}, batch_size="16")]), {}))
    assert "No trial here has usable figures" in read.text
    assert "Ctrl-C" in read.text


def test_places_are_shown_apart_and_never_averaged() -> None:
    other = {"device": "Another Card", "dirty": "true"}
    there = [dataclasses.replace(each, tags={**each.tags, **other}) for each in _factorial()]
    found = _find([*_factorial(), *there])
    read = _Page(page(found, {}))
    assert len(found.groups) == 2
    assert "reported separately, not averaged in" in read.text
    assert "All above is about machine A" in read.text
    assert re.search(r"Machine [AB]: Another Card", read.text)
    assert "Another Card" in read.text
    assert "the code that ran is not in any commit" in read.text
    assert len(read.ids) == len(set(read.ids))


def test_names_from_runs_cannot_bring_markup_in() -> None:
    evil = '<script>alert("x")</script>'
    trials = _factorial(optimizer=evil)
    trials += [trial(outcome="killed", tags={"reason": evil, "commit": evil, "command": evil}, sweep=None)]
    trials = [dataclasses.replace(each, run_id=each.run_id + evil, name=each.name + evil) for each in trials]
    findings = dataclasses.replace(_find(trials), title=evil, commands=(evil,))
    read = _Page(page(findings, _lines(trials)))
    assert read.tags.count("script") == 1  # the page's own
    assert evil in read.text


def test_the_page_needs_nothing_else() -> None:
    trials = _factorial()
    text = page(_find(trials, claims=True), _lines(trials))
    read = _Page(text)
    assert all(reference.startswith("#") for reference in read.references)
    assert not {"link", "iframe", "img", "object"} & set(read.tags)
    assert "src" not in "".join(re.findall("<script[^>]*>", text))
    assert not re.search(r"url\((?!#)|@import|@font-face", text)
    targets = {f"#{name}" for name in read.ids}
    assert set(read.references) <= targets


def test_same_findings_give_the_same_bytes(tmp_path: Path) -> None:
    trials = _factorial()
    findings = _find(trials)
    write_page(findings, _lines(trials), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page(findings, _lines(trials))


def test_a_hundred_trials_stay_within_what_a_phone_loads() -> None:
    trials = _factorial(repeats=13)
    assert len(page(_find(trials), _lines(trials)).encode()) < 1_500_000


@settings(max_examples=10)
@given(st.data())
def test_no_page_shows_a_figure_that_is_none(data: st.DataObject) -> None:
    """Whatever half of a sweep is there: figures are figures, or there is a reason."""
    whole = _factorial(vram_limit_gib="80.0")
    kept = data.draw(st.lists(st.sampled_from(whole), min_size=1, max_size=9, unique_by=lambda each: each.run_id))
    ends = data.draw(st.lists(st.sampled_from(["finished", "out_of_memory", "killed", "diverged"]), min_size=len(kept),
                              max_size=len(kept)))  # fmt: skip
    missing = data.draw(st.sampled_from([(), ("energy/joules_per_token",), ("vram/peak_device_gib",)]))
    trials = [
        dataclasses.replace(
            each,
            outcome=end,
            metrics={k: v for k, v in each.metrics.items() if k not in missing} if end == "finished" else {},
        )
        for each, end in zip(kept, ends, strict=True)
    ]
    read = _Page(page(_find(trials), _lines(trials[:2])))
    assert not re.search(r"\b(nan|NaN|inf|Infinity|None)\b", read.text)
    assert len(read.ids) == len(set(read.ids))


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=8))
def test_text_on_every_cell_is_readable(values: list[float]) -> None:
    """WCAG 2.2: 4.5 to 1."""

    def luminance(code: str) -> float:
        parts = [int(code[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for value in values:
        made = colour(value, values)
        low, high = sorted((luminance(made.background), luminance(made.text)))
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_a_timeline_marks_the_window_after_warm_up() -> None:
    told = dataclasses.replace(trial(), params={"measure.warmup_steps": "3"})
    steps = [(1000 * n, n, 1.0 if n > 3 else 5.0) for n in range(1, 11)]
    line = timeline(told, {STEP_SECONDS: steps})
    assert line is not None
    assert line.window is not None
    assert line.panels[0].median_text == "median 1 s"
    unknown = timeline(dataclasses.replace(told, params={}), {STEP_SECONDS: steps})
    assert unknown is not None
    assert unknown.window is None
    assert timeline(told, {STEP_SECONDS: [(0, 1, math.nan)]}) is None


def test_a_timeline_keeps_peaks_of_long_series() -> None:
    power = [(10 * n, n, 900.0 if n == 4321 else 100.0) for n in range(20_000)]
    line = timeline(trial(), {POWER_WATTS: power})
    assert line is not None
    heights = [float(y) for y in re.findall(r" ([\d.]+)", line.panels[0].path)]
    assert len(heights) < 400
    assert min(heights) < 20


@pytest.mark.parametrize(
    ("text", "set_in_type"),
    [
        ("-4.6 % (-8 %)", "\N{MINUS SIGN}4.6\xa0% (\N{MINUS SIGN}8\xa0%)"),
        ("x7.3", "\N{MULTIPLICATION SIGN}7.3"),
        ("2x512", "2x512"),
        ("GPU-1 1e-5", "GPU-1 1e-5"),
    ],
)
def test_signs_are_set_in_type_in_figures_alone(text: str, set_in_type: str) -> None:
    assert typeset(text) == set_in_type
