"""What a run's page in MLflow says first: how it ended, its figures, what to mind and how to run it again."""

from lora_lab.store.record import RUNNING, Record

NOTE = "mlflow.note.content"
"""The tag that MLflow shows as a run's description."""

_FIGURES = (
    ("throughput", "throughput/tokens_per_second", "{:,.0f} tokens/s"),
    ("card's memory, peak", "vram/peak_device_gib", "{:.2f} GiB"),
    ("energy", "energy/joules_per_token", "{:.4f} J/token"),
    ("held-out loss", "loss/eval", "{:.4f}"),
)
_BEFORE = "loss/eval_before"


def description(record: Record) -> str:
    """Return it as markdown."""
    body = _of_sweep(record) if record.is_sweep else _of_trial(record)
    command = record.tags.get("command", "")
    return "\n".join([*body, *(["", "```", command, "```"] if command else [])])


def _of_sweep(record: Record) -> list[str]:
    axes = {key.removeprefix("axis."): text for key, text in record.params.items() if key.startswith("axis.")}
    counts = " x ".join(f"{record.params[key]} {key}" for key in ("points", "repeats") if key in record.params)
    lines = [f"**{record.params.get('trials', '?')} trials planned** ({counts})", ""]
    lines += _table(("varied", "values"), [(key, text.replace(",", ", ")) for key, text in axes.items()])
    return [*lines, "", "`lora-lab report` says what they show; its page is then among this run's artifacts."]


def _of_trial(record: Record) -> list[str]:
    reason = record.tags.get("reason")
    ended = "running" if record.outcome == RUNNING else record.outcome.replace("_", " ")
    lines = [f"**{ended}**" + (f": {_cell(reason)}" if reason else ""), ""]
    rows = [(name, _figure(record, key, form)) for name, key, form in _FIGURES]
    lines += _table(("figure", "value"), rows)
    for tag, name in (("stand_ins", "Stand-ins"), ("warnings", "Warnings")):
        text = record.tags.get(tag, "none")
        if text != "none":
            lines += ["", f"**{name}**", "", *(f"- {_cell(one)}" for one in text.split("; "))]
    return lines


def _figure(record: Record, key: str, form: str) -> str:
    if key not in record.metrics:
        return f"absent: {record.tags.get(f'absent.{key}', 'not recorded')}"
    text = form.format(record.metrics[key])
    if key == "loss/eval" and _BEFORE in record.metrics:
        text += f" ({record.metrics[_BEFORE]:.4f} before training)"
    if key.startswith("loss/") and record.params.get("model.weights") == "random":
        text += ", of random weights: says nothing about quality"
    return text


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> list[str]:
    return [f"| {left} | {_cell(right)} |" for left, right in [head, ("---", "---"), *rows]] if rows else []


def _cell(text: str) -> str:
    """Return a text that markdown takes as one line of plain text."""
    return text.replace("\n", " ").replace("|", "\\|").replace("<", "&lt;")
