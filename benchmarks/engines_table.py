"""docs/engines.md's tables: the ladder of engines, the study's factorial under two of them, and their losses."""

from collections.abc import Callable, Sequence

from benchmarks.reports import RESULTS, markdown, origin, stored, where
from lora_lab.store.packed_runs import PackedRuns
from lora_lab.store.stored_runs import StoredRuns
from lora_lab.store.trials import Trial
from lora_lab.telemetry.metrics import metric

ENGINES = ("eager", "liger", "compile", "graph")
LADDER = "adamw_fused"
"""The optimizer of the ladder; the factorial has others."""
SHOWN = ("throughput/tokens_per_second", "vram/peak_device_gib", "energy/joules_per_token")
REFERENCE = "eager, fp32"


def ladder() -> str:
    """Return tokens/s, GiB on the card and J/token of each engine, shape by shape."""
    trials = [trial for trial in _trials() if trial.params["optimizer"] == LADDER]

    def figures(trial: Trial) -> str:
        return "; ".join(metric(key).form.format(trial.metrics[key]) if key in trial.metrics else "-" for key in SHOWN)

    table = _table(trials, "tokens/s; GiB; J/token", _shape, lambda trial: trial.params["engine"], figures)
    by_shape: dict[str, list[float]] = {}
    for trial in trials:
        by_shape.setdefault(_shape(trial), []).append(trial.metrics["loss/train"])
    apart = max(max(found) - min(found) for found in by_shape.values())
    same = f"Mean training loss in the window is the same within {apart:.4f} nats per token at each shape."
    return f"{table}\n\n{same} Each point once. {origin(trials)}"


def optimizers() -> str:
    """Return tokens/s and the step's time over its kernels', for each optimizer and precision under two engines."""
    trials = [trial for trial in _trials() if trial.params["optimizer"] != LADDER]

    def figures(trial: Trial) -> str:
        rate, step, kernels = (
            trial.metrics[f"throughput/{key}"]
            for key in ("tokens_per_second", "step_seconds_p50", "gpu_busy_seconds_per_step")
        )
        return f"{rate:,.0f}; {1e3 * step:.0f}; {1e3 * kernels:.0f}"

    def line(trial: Trial) -> str:
        return f"{trial.params['engine']}, {_shape(trial)}"

    def column(trial: Trial) -> str:
        return f"{trial.params['optimizer']} {trial.params['precision']}"

    table = _table(trials, "tokens/s; ms per step; ms of GPU work", line, column, figures)
    return f"{table}\n\nEach point once. {origin(trials)}"


def losses() -> str:
    """Return how far the losses of engines are apart, and from eager in fp32."""
    rows, made = [], []
    for model, name in (("QLoRA on an H100", "h100"), ("LoRA on a CPU", "cpu")):
        content = stored(f"{name}/engine_losses")
        made.append(f"{model}: {where(content['origin'])}")
        for pair, apart in content["apart"].items():
            if pair.startswith("eager - ") or REFERENCE in pair:
                figures = [f"{apart[key]:.4f}" for key in ("median", "most", "held_out")]
                rows.append([model, *pair.split(" - "), *figures])
    head = ["100 steps", "one", "the other", "steps apart, median", "at most", "held-out loss apart, after"]
    return f"{markdown(head, rows)}\n\nIn nats per token. {'; '.join(made)}."


def _trials() -> list[Trial]:
    return list(StoredRuns(PackedRuns(RESULTS / "h100/engines.jsonl.gz")).runs()[0])


def _place(trial: Trial) -> tuple[int, int, int, str, bool]:
    """Return by what trials are ordered in a table: shape, engine, optimizer, precision."""
    params = trial.params
    shape = int(params["batch_size"]), int(params["seq_len"])
    return *shape, ENGINES.index(params["engine"]), params["optimizer"], params["precision"] == "bf16"


def _shape(trial: Trial) -> str:
    return f"{trial.params['batch_size']}x{trial.params['seq_len']}"


def _table(
    trials: Sequence[Trial],
    corner: str,
    row: Callable[[Trial], str],
    column: Callable[[Trial], str],
    cell: Callable[[Trial], str],
) -> str:
    """Return a table with one trial in each cell, "-" where there is none."""
    cells = {(row(trial), column(trial)): cell(trial) for trial in trials}
    ordered = sorted(trials, key=_place)
    names, lines = (dict.fromkeys(of(trial) for trial in ordered) for of in (column, row))
    return markdown([corner, *names], [[line, *(cells.get((line, name), "-") for name in names)] for line in lines])
