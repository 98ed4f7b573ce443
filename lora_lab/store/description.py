"""The description of a run on its MLflow page: how it ended, its figures, warnings, and how to run it again."""

from lora_lab.store.record import RUNNING, Record

NOTE = "mlflow.note.content"
"""The tag that MLflow shows as a run's description."""

_FIGURES = (
    ("tokens/s", "throughput/tokens_per_second", "{:,.0f}"),
    ("card's peak, GiB", "vram/peak_device_gib", "{:.2f}"),
    ("J/token", "energy/joules_per_token", "{:.4f}"),
    ("held-out loss", "loss/eval", "{:.4f}"),
)
_BEFORE = "loss/eval_before"


def description(record: Record) -> str:
    """Return the description as markdown."""
    body = _of_sweep(record) if record.is_sweep else _of_trial(record)
    command = record.tags.get("command", "")
    return "\n".join([*body, *(["", "```", command, "```"] if command else [])])


def _of_sweep(record: Record) -> list[str]:
    axes = {key.removeprefix("axis."): text for key, text in record.params.items() if key.startswith("axis.")}
    counts = " x ".join(f"{record.params[key]} {key}" for key in ("points", "repeats") if key in record.params)
    lines = [f"**{record.params.get('trials', '?')} trials planned** ({counts})", ""]
    lines += [f"- {_plain(key)}: {_plain(text.replace(',', ', '))}" for key, text in axes.items()]
    return [*lines, "", "Run `lora-lab report` to see the results. Its page is then among this run's artifacts."]


def _of_trial(record: Record) -> list[str]:
    """Return the lines for a trial. The figures come first, in one row: MLflow folds away what is below the first
    lines."""
    reason = record.tags.get("reason")
    ended = "running" if record.outcome == RUNNING else record.outcome.replace("_", " ")
    lines = [f"**{ended}**" + (f": {_plain(reason)}" if reason else ""), ""]
    rows = [[name for name, _, _ in _FIGURES], ["---"] * len(_FIGURES)]
    rows.append([_figure(record, key, form) for _, key, form in _FIGURES])
    lines += [f"| {' | '.join(row)} |" for row in rows]
    absent = [(name, record.tags.get(f"absent.{key}")) for name, key, _ in _FIGURES if key not in record.metrics]
    lines += ["", *(f"- {name} absent: {_plain(why)}" for name, why in absent if why)]
    for tag, name in (("stand_ins", "Stand-ins"), ("warnings", "Warnings")):
        text = record.tags.get(tag, "none")
        if text != "none":
            lines += ["", f"**{name}**", "", *(f"- {_plain(one)}" for one in text.split("; "))]
    return lines


def _figure(record: Record, key: str, form: str) -> str:
    if key not in record.metrics:
        return "absent"
    text = form.format(record.metrics[key])
    if key == "loss/eval" and _BEFORE in record.metrics:
        text += f" ({record.metrics[_BEFORE]:.4f} before training)"
    if key == "loss/eval" and record.params.get("model.weights") == "random":
        text += ", random weights"
    return text


def _plain(text: str) -> str:
    """Return the text as one line that markdown shows unchanged."""
    return text.replace("\n", " ").replace("|", "\\|").replace("<", "&lt;")
