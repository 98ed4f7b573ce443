"""docs/paper.md's table: what the study's two changes made here with all else equal, on each machine."""

import statistics

from benchmarks.answers import CLAIMED, factorial
from benchmarks.reports import markdown, origin
from lora_lab.report.measures import THROUGHPUT
from lora_lab.report.writing.numbers import change, interval

HEAD = ["only this changed", "machine", "trials were", "tokens/s", "95 % interval", "difference seen"]

GPU_WORK = "throughput/gpu_busy_seconds_per_step"


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


def shape() -> str:
    """Return a sentence: how much faster the GPU's own work becomes by the shape alone, from run 1's to run 2's."""
    findings, study = factorial()
    found = findings.groups[0]
    first, second = ({key: study.run(run).settings[key] for key in ("batch_size", "seq_len")} for run in ("1", "2"))
    busy: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for trial in found.group.measured:
        params = trial.params
        if params["vram_limit_gib"] == "None" and trial.metrics.get(GPU_WORK):
            slots = int(params["batch_size"]) * int(params["seq_len"])
            here = busy.setdefault((params["optimizer"], params["precision"]), {})
            here.setdefault(f"{params['batch_size']}x{params['seq_len']}", []).append(trial.metrics[GPU_WORK] / slots)
    names = ["x".join(str(value) for value in settings.values()) for settings in (first, second)]
    ratio = statistics.geometric_mean(
        statistics.fmean(each[names[0]]) / statistics.fmean(each[names[1]]) for each in busy.values()
    )
    return (
        f"On machine A, going from {names[0]} to {names[1]} alone made the GPU's own work {ratio:.2f} times as fast\n"
        "per token, with the same optimizer and precision. That is more than the study's whole gain."
    )


def covered() -> str:
    """Return what trials the report is about."""
    findings, _ = factorial()
    trials = [trial for found in findings.groups for trial in found.group.trials]
    finished = sum(trial.finished for trial in trials)
    return (
        f"The report covers {len(trials)} trials on {len(findings.groups)} machines: {finished} finished, "
        f"{len(trials) - finished} out of memory."
    )


def energy_agreement() -> str:
    """Return how far the energy counter and the integral of power are apart in the factorial's trials."""
    findings, _ = factorial()
    trials = [trial for found in findings.groups for trial in found.group.measured]
    metrics = [trial.metrics for trial in trials]
    apart = [100 * each["energy/power_disagreement"] for each in metrics if "energy/power_disagreement" in each]
    seconds = [each["window/seconds"] for each in metrics]
    return (
        f"In the factorial's {len(apart)} trials, with windows of {min(seconds):.0f} to {max(seconds):.0f} s, the "
        f"energy counter and the integral of power differ by {min(apart):+.1f} to {max(apart):+.1f} %. "
        f"Both come from one sensor. {origin(trials)}"
    )
