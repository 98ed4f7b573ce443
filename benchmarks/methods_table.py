"""What docs/methods.md has of sweep=methods, from its stored records."""

from benchmarks.jobs_table import stored_runs
from benchmarks.reports import markdown, origin
from lora_lab.comparison.halving import CONTENDER
from lora_lab.report.answers.contenders import contenders
from lora_lab.report.writing.contenders import cells, heads


def table() -> str:
    """Return each method at its best learning rate, and its loss at each rate after the first rung."""
    store = stored_runs("methods")
    trials = store.runs()[0]
    [found] = contenders(trials, {trial.run_id: store.series(trial.run_id) for trial in trials})
    least = min(int(trial.params["train.max_steps"]) for trial in trials)
    losses: dict[str, dict[float, str]] = {}
    for trial in trials:
        if int(trial.params["train.max_steps"]) == least:
            loss = trial.metrics.get("loss/eval") if trial.finished else None
            rate = float(trial.params["learning_rate"])
            losses.setdefault(trial.tags[CONTENDER], {})[rate] = trial.outcome if loss is None else f"{loss:.4f}"
    lines = []
    for each in found.contenders:
        own = sorted(losses[each.name].items())
        lines.append([each.name, *(f"{rate:g}: {loss}" for rate, loss in own)])
    by_rate = markdown(["contender", "lowest rate", "second", "third", "highest"], lines)
    return (
        f"{markdown(heads(found), cells(found))}\n\n{origin(trials)}\n\n"
        f"Held-out losses after {least} steps, by which the rates were chosen:\n\n{by_rate}"
    )
