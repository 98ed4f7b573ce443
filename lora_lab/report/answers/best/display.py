"""An answer of `lora_lab.best` on a terminal."""

import math

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from lora_lab.report.answers.best.another_card import RESERVE
from lora_lab.report.answers.best.candidates import Candidate
from lora_lab.report.answers.best.choice import Choice
from lora_lab.report.answers.best.command import recorded, short
from lora_lab.report.answers.best.ranking import RunnerUp
from lora_lab.report.measures import HOURS, OBJECTIVES, OF_JOBS, VRAM, Measure
from lora_lab.report.statistics.estimates import percent
from lora_lab.report.writing.labels import count
from lora_lab.report.writing.numbers import TOO_NOISY, is_absurd

_RUNNERS_UP = 5
_INTERVALS = "separate 95 % intervals"
_VERDICTS = {True: "significant", False: "no significant difference from the best", None: "not known"}


def show_context(choice: Choice, console: Console) -> None:
    """Print in one sentence which trials answer, and for another card how much of its memory may be used."""
    text = count(len(choice.subject.measured), f"measured {choice.subject.kind.value}")
    if choice.another_card:
        text += " that come with lora_lab"
    if choice.is_largest_model:
        text += f", of the largest model {'among them' if choice.wish.vram_gib is None else 'that fits'}"
    _say(console, f"From {text}: {choice.subject.text}.")
    if choice.another_card and choice.wish.vram_gib is not None:
        usable = choice.wish.vram_gib
        _say(console, f"Of {usable / (1 - RESERVE):g} GiB, {usable:.4g} may be used: {100 * RESERVE:g} % stay free.")


def show_choice(choice: Choice, console: Console) -> None:
    """Print the best configuration with its figures, the runners-up, and last what to type and one line of doubt."""
    if choice.best is None:
        _show_nothing_fits(choice, console)
    else:
        _show_best(choice, choice.best, console)
    _list(console, "Left out", choice.left_out)
    _list(console, "Remarks", choice.remarks)
    _list(console, "Other trials", choice.others)
    if choice.best is not None:
        _recommend(choice, choice.best, console)


def _show_best(choice: Choice, best: Candidate, console: Console) -> None:
    wish = choice.wish
    limits = [f"within {wish.vram_gib:g} GiB"] if wish.vram_gib is not None else []
    limits += [f"within {wish.hours:g} h"] if wish.hours is not None else []
    if wish.max_loss_increase is not None:
        limits.append(f"held-out loss at most {100 * wish.max_loss_increase:g} % above the lowest")
    limited = f" ({', '.join(limits)})" if limits else ""
    console.print(f"\nBest {wish.objective.title}{limited}: ", style="bold", end="", highlight=False)
    console.print(best.label, style="bold", highlight=False, markup=False)
    for measure in (*OBJECTIVES, *OF_JOBS):
        if measure.name in best.figures:
            console.print(f"  {measure.title:<18} {_figure(best, measure)}", highlight=False, markup=False)
    if choice.runners_up:
        console.print()
        console.print(_table(choice, wish.objective))


def _recommend(choice: Choice, best: Candidate, console: Console) -> None:
    """Print what to use, its command on one line however narrow the terminal, and how far to believe it."""
    newest = best.trials[-1]
    console.print(f"\nUse {best.label}:", style="bold", highlight=False, markup=False)
    text = short(newest, choice.subject.measured) if choice.another_card else recorded(newest)
    console.print(f"    {text}", soft_wrap=True, highlight=False, markup=False)
    _say(console, f"Doubt: {choice.sure}.")


def _table(choice: Choice, objective: Measure) -> Table:
    shown = choice.runners_up[:_RUNNERS_UP]
    more = len(choice.runners_up) - len(shown)
    why = {runner.estimate.why_no_interval for runner in shown}
    intervals = f"no intervals: {why.pop()}" if len(why) == 1 and "" not in why else _INTERVALS
    title = f"Runners-up{f' ({more} more not shown)' if more else ''}; mean difference from the best, {intervals}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), title_style="")
    table.add_column("configuration", overflow="fold")
    table.add_column(objective.unit, justify="right", no_wrap=True)
    table.add_column("n", justify="right")
    table.add_column("against the best", overflow="fold", ratio=1)
    for runner in shown:
        figure = runner.candidate.figures[objective.name]
        table.add_row(
            escape(runner.candidate.label),
            objective.form.format(figure.median),
            str(figure.n),
            escape(_beside(runner, objective, intervals != _INTERVALS)),
        )
    return table


def _beside(runner: RunnerUp, measure: Measure, all_lack: bool) -> str:
    found = runner.estimate
    if is_absurd(found, measure):
        return TOO_NOISY
    value = _change(found.value, measure)
    if found.low is None or found.high is None:
        return value if all_lack else f"{value}; no interval: {found.why_no_interval}"
    return f"{value} ({_change(found.low, measure)} to {_change(found.high, measure)}): {_VERDICTS[found.seen]}"


def _change(value: float, measure: Measure) -> str:
    """Return a difference, in percent unless a ratio is easier to read."""
    if not measure.ratios:
        return f"{value:+.4f}"
    return f"x{math.exp(value):.3g}" if value > math.log(3) else f"{percent(value):+.1f} %"


def _figure(candidate: Candidate, measure: Measure) -> str:
    figure = candidate.figures[measure.name]
    if figure.n == 1:
        return f"{measure.write(figure.median)} (1 trial)"
    ends = f"{measure.form.format(figure.low)} to {measure.form.format(figure.high)}"
    return f"{measure.write(figure.median)} (median of {figure.n}: {ends})"


def _show_nothing_fits(choice: Choice, console: Console) -> None:
    wish, least, shortest = choice.wish, choice.least, choice.shortest
    if shortest is not None:
        console.print(f"\nNothing that was measured takes at most {wish.hours:g} h.", style="bold", highlight=False)
        if HOURS.name in shortest.figures:
            _say(console, f"{shortest.label} takes least: {HOURS.write(shortest.figures[HOURS.name].high)}.")
        return
    budget = f"{wish.vram_gib:g} GiB" if wish.vram_gib is not None else "what was asked"
    console.print(f"\nNothing that was measured fits into {budget}.", style="bold", highlight=False)
    if least is None or least.needs_gib is None or wish.vram_gib is None:
        return
    if least.fit is not None and least.fit.next_is_bound:
        _say(console, f"{least.label} needs least: more than {VRAM.write(least.needs_gib)}, which it ran out of.")
        return
    _say(console, f"{least.label} needs least: {VRAM.write(least.needs_gib)}.")
    if least.ran_out:
        _say(console, f"It ran out of memory within {budget}.")
        return
    if choice.another_card:
        return
    text = f"{recorded(least.trials[-1])} vram_limit_gib={wish.vram_gib:g}"
    _say(console, "On a large card torch keeps more memory than it needs. To test whether less is enough, run:")
    console.print(f"    {text}\n", soft_wrap=True, highlight=False, markup=False)


def _list(console: Console, head: str, lines: tuple[str, ...]) -> None:
    if lines:
        console.print(f"\n{head}:")
    for line in lines:
        console.print(Padding(line, (0, 0, 0, 2)), highlight=False, markup=False)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False)
