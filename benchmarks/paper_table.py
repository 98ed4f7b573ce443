"""docs/paper.md's table: what the study's two changes made here with all else equal, on each machine."""

from benchmarks.answers import CLAIMED, factorial
from benchmarks.reports import markdown, origin
from lora_lab.report.measures import THROUGHPUT
from lora_lab.report.writing.numbers import change, interval

HEAD = ["only this changed", "machine", "trials were", "tokens/s", "95 % interval", "difference seen"]


def paper() -> str:
    """Return the table."""
    findings, _ = factorial()
    rows = [
        [
            f"`{factor}`: {over} to {of}",
            "AB"[machine],
            each.regime,
            change(each.estimate.value, THROUGHPUT),
            interval(each.estimate, THROUGHPUT),
            "yes" if each.estimate.seen else "no",
        ]
        for factor, of, over, *_ in CLAIMED
        for machine, found in enumerate(findings.groups)
        for each in found.contrasts
        if (each.factor, each.of, each.measure) == (factor, of, THROUGHPUT) and each.regime != "mixed"
    ]
    trials = [trial for found in findings.groups for trial in found.group.measured]
    return f"{markdown(HEAD, rows)}\n\n{origin(trials)} A and B are two such cards."
