"""What repeats=auto answered on a real card, from the stored trials."""

from pathlib import Path

from benchmarks.reports import origin
from lora_lab.comparison.rule import RULE_TAG
from lora_lab.config import InvalidInput
from lora_lab.report.answers.auto import answers_of
from lora_lab.store.packed_runs import PackedRuns
from lora_lab.store.stored_runs import StoredRuns

RESULTS = Path(__file__).parent / "results" / "h200"


def gpu_bound() -> str:
    """Return a question's command and its answer, GPU-bound."""
    return _asked("auto_gpu_bound")


def host_bound() -> str:
    """Return the same question where the GPU waits for the host."""
    return _asked("auto_host_bound")


def _asked(name: str) -> str:
    trials, sweeps = StoredRuns(PackedRuns(RESULTS / f"{name}.jsonl.gz")).runs()
    [sweep] = [sweep for sweep in sweeps if RULE_TAG in sweep.tags]
    said = answers_of(sweep, trials)
    if not said:
        raise InvalidInput("the stored sweep has no answer")
    command = sweep.tags["command"].replace("python -m lora_lab", "lora-lab")
    lines = "\n".join(line.strip() for line in said)
    return f"```\n$ {command}\n{lines}\n```\n\n{origin(trials)}"
