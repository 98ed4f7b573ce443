"""docs/jobs.md's tables of what whole trainings learnt, from the stored trials of the sweeps maths, lab_chat, quality
in benchmarks/sweep.

The jobs of maths and of lab_chat ran at the same time on one card, so their losses and answers count, and no speeds.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from scipy.stats import t

from benchmarks.killed_jobs import table
from benchmarks.reports import markdown, origin, stored, where
from lora_lab.store.packed_runs import PackedRuns
from lora_lab.store.stored_runs import StoredRuns
from lora_lab.store.trials import Trial

RESULTS = Path(__file__).parent / "results" / "h200"
_LOSSES = ("step/loss", "heldout/loss")


def maths() -> str:
    """Return the exact match of each seed, and of another seed of the same kind."""
    trials = sorted(stored_runs("maths").runs()[0], key=_seed)
    head = [
        "seed",
        "exact match, base",
        "exact match, tuned",
        "held-out loss",
        "answers that end",
        "loss on general text",
    ]
    rows = [
        [
            str(_seed(trial)),
            _share(trial, "quality/exact_match_base"),
            _share(trial, "quality/exact_match_tuned"),
            _loss(trial, "eval"),
            _ended(trial),
            _change(trial, "general"),
        ]
        for trial in trials
    ]
    tuned = [trial.metrics["quality/exact_match_tuned"] for trial in trials]
    middle, off = statistics.mean(tuned), _student(tuned)
    [answers] = {int(trial.metrics["quality/answers"]) for trial in trials}
    return (
        f"{markdown(head, rows)}\n\n"
        f"All {answers} held-out questions were answered. Brackets are 95 % intervals: over questions, and for a loss "
        f"over rows. Over seeds, the tuned model's exact match is {middle:.1%} ± {off:.1%} (Student's t, {len(tuned)} "
        f"seeds). {origin(trials)}"
    )


def lab_chat() -> str:
    """Return the losses by each engine and seed, and how far two engines are apart."""
    store = stored_runs("lab_chat")
    trials = sorted(store.runs()[0], key=lambda trial: (_seed(trial), trial.params["engine"]))
    head = [
        "engine",
        "seed",
        "held-out loss",
        "its change",
        "answers that end",
        "tokens in an answer",
        "loss on general text",
    ]
    rows = [
        [
            trial.params["engine"],
            str(_seed(trial)),
            _loss(trial, "eval"),
            _change(trial, "eval"),
            _ended(trial),
            f"{trial.metrics['quality/answer_tokens_base']:.0f} -> {trial.metrics['quality/answer_tokens_tuned']:.0f}",
            _change(trial, "general"),
        ]
        for trial in trials
    ]
    steps, heldout = (max(_apart(store, trials, key)) for key in _LOSSES)
    return (
        f"{markdown(head, rows)}\n\n"
        f"With the same seed, the engines' training losses differ by at most {steps:.4f} nats in any step, and their "
        f"held-out losses by at most {heldout:.4f} in any evaluation. Losses are in nats per token. {origin(trials)}"
    )


def quality() -> str:
    """Return what each point of a sweep learnt, and what it took; and how many points were not reached."""
    trials, [sweep] = stored_runs("quality").runs()
    done = sorted((trial for trial in trials if trial.finished), key=lambda trial: trial.metrics["loss/eval"])
    head = ["rank", "learning rate", "held-out loss", "its change", "minutes", "kWh"]
    rows = [
        [
            trial.params["method.rank"],
            trial.params["learning_rate"],
            _loss(trial, "eval"),
            _change(trial, "eval"),
            f"{60 * trial.metrics['job/hours']:.2f}",
            f"{trial.metrics['job/kwh']:.5f}",
        ]
        for trial in done
    ]
    return f"{markdown(head, rows)}\n\n{len(done)} of the {sweep.planned} points finished. {origin(done)}"


def killed() -> str:
    """Return how far jobs by several settings are from eager's, and from themselves when killed and resumed."""
    found = stored("h200/killed_jobs")
    return f"{table(found['jobs'])}\n\nMeasured on {where(found['origin'])}."


def stored_runs(name: str) -> StoredRuns:
    """Return the records of results/h200/NAME.jsonl.gz."""
    return StoredRuns(PackedRuns(RESULTS / f"{name}.jsonl.gz"))


def _seed(trial: Trial) -> int:
    return int(trial.params["seed"])


def _share(trial: Trial, key: str) -> str:
    metrics = trial.metrics
    return f"{metrics[key]:.1%} ({metrics[f'{key}_low']:.1%} to {metrics[f'{key}_high']:.1%})"


def _loss(trial: Trial, which: str) -> str:
    return f"{trial.metrics[f'loss/{which}_before']:.3f} -> {trial.metrics[f'loss/{which}']:.3f}"


def _change(trial: Trial, which: str) -> str:
    change, low, high = (trial.metrics[f"loss/{which}_change{end}"] for end in ("", "_low", "_high"))
    return f"{change:+.3f} ({low:+.3f} to {high:+.3f})"


def _ended(trial: Trial) -> str:
    return f"{trial.metrics['quality/stop_rate_base']:.0%} -> {trial.metrics['quality/stop_rate_tuned']:.0%}"


def _student(values: Sequence[float]) -> float:
    """Return half the width of the 95 % interval of a mean."""
    quantile = float(t.ppf(0.975, len(values) - 1))
    return quantile * statistics.stdev(values) / len(values) ** 0.5


def _apart(store: StoredRuns, trials: Sequence[Trial], key: str) -> list[float]:
    """Return the differences between engines, of each seed and each point of a series."""
    found: list[float] = []
    for seed in {_seed(trial) for trial in trials}:
        first, second = (
            [reading[2] for reading in store.series(trial.run_id, [key])[key]]
            for trial in trials
            if _seed(trial) == seed
        )
        found += [abs(one - other) for one, other in zip(first, second, strict=True)]
    return found
