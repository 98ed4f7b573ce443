"""What looking costs a trial's throughput: the sampler on and off within one trial.

    python -m benchmarks.looking OUT [SECONDS [override ...]]

The trial runs in this process, the sampler in another, as they do in a session. Every adapter layer notes the time as
its forward and its backward are queued: some 400 marks a step. Between two marks the usual (median) time of that
stretch counts as work done, so that work done per second tells the host's speed at any moment.

Two questions are put to it. **Blocks**: the sampler is on (A) and off (B) for two seconds each, as A B B A, so that a
steady drift falls out; the cost is the mean over the groups of log(speed without) - log(speed with). A host's speed
swings by 10 % and more from second to second on a shared machine, so this interval is wide. **Readings**: the speed
during each reading, and 2 ms on, beside the speed in stretches of the same length 8 to 20 ms before and after it. The
swings are slow against that and fall out, and the interval is narrow; a cost that comes later than 2 ms after a
reading would show in the blocks alone. Where marks are sparse (the optimizer's step) nothing is compared. The cost is
the work that a reading loses, times readings a second, over the work of a mean second. Both with Student's 95 %
interval. `sham` puts the second question where there was no reading, in the blocks without the sampler: its true value
is 0. Random weights and tokens at Qwen2.5-1.5B's shapes.
"""

import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from benchmarks.compose import compose
from benchmarks.reports import provenance, write_report
from lora_lab.config import TrialConfig
from lora_lab.events import Ended, Event, WindowClosed, WindowOpened
from lora_lab.store.environment import device_facts, environment
from lora_lab.telemetry.rapl import Rapl
from lora_lab.telemetry.sampler import RATE_HZ, Sample, Sampler
from lora_lab.telemetry.sensors import reader
from lora_lab.trial.devices import choose_placement, worker_environment

BLOCK_SECONDS = 2.0
PATTERN = (True, False, False, True)
AFTER_SECONDS = 0.002
DENSE_SECONDS = 0.002
"""A stretch that usually takes longer than this tells too little about when in it time was lost."""
CONTROLS_SECONDS = (-0.020, -0.014, -0.008, 0.008, 0.014, 0.020)
"""Where the stretches to compare with begin, counted from the reading's begin (before) or end (after)."""
COMMON = [
    "model=qwen2_5_1_5b",
    "model.weights=random",
    "data=random_tokens",
    "data.rows=256",
    "measure.warmup_steps=10",
    "measure.eval_rows=0",
    "measure.profile_steps=0",
    "tracking=none",
]
SHAPES = {"1x512": ["batch_size=1", "seq_len=512"], "2x2048": ["batch_size=2", "seq_len=2048"]}
_GUESSED_STEP_SECONDS = 0.35

Floats = NDArray[np.float64]
Spans = list[tuple[float, float]]


def look(pipe: Connection) -> None:
    """The other process: read as a session does, in blocks, until told to stop; then send what was done when."""
    inner = reader(choose_placement("auto").cards, Rapl())
    readings: Spans = []
    blocks: list[tuple[float, float, bool]] = []

    def read(slow: bool) -> list[Sample]:
        start = time.monotonic()
        # without a card, for a rehearsal: as long as a reading of one
        samples = inner(slow) if inner else (time.sleep(0.004), [Sample(t=start)])[1]
        readings.append((start, time.monotonic()))
        return samples

    with Sampler(read) as sampler:
        while not pipe.poll():
            on = PATTERN[len(blocks) % len(PATTERN)]
            sampler.pause(not on)
            start = time.monotonic()
            time.sleep(BLOCK_SECONDS)
            blocks.append((start, time.monotonic(), on))
    pipe.send((readings, blocks, sampler.cpu_seconds))


def train(config: TrialConfig, folder: Path) -> tuple[list[tuple[float, int]], tuple[float, float]]:
    """One trial in this process: (moment, which mark) in order, and when the window was open."""
    from lora_lab.worker import trial
    from lora_lab.worker.stages import model_loading

    marks: list[tuple[float, int]] = []
    load = model_loading.load_model

    def load_with_marks(*arguments: Any) -> Any:
        model = load(*arguments)
        layers = [module for module in model.modules() if hasattr(module, "lora_A")]
        for number, layer in enumerate(layers):
            backward = len(layers) + number

            def forward_mark(_: Any, __: Any, output: Any, mine: int = number, other: int = backward) -> None:
                marks.append((time.monotonic(), mine))
                if output.requires_grad:
                    output.register_hook(lambda ___: marks.append((time.monotonic(), other)))

            layer.register_forward_hook(forward_mark)
        return model

    edges: list[float] = []

    def emit(event: Event) -> None:
        if isinstance(event, WindowOpened | WindowClosed):
            edges.append(event.t)
        if isinstance(event, Ended) and event.reason:
            raise SystemExit(f"{event.outcome}: {event.reason}\n{event.traceback}")

    folder.mkdir(parents=True, exist_ok=True)
    model_loading.load_model = load_with_marks
    try:
        trial.run_trial(config, folder, emit)
    finally:
        model_loading.load_model = load
    return marks, (edges[0], edges[1])


class Work:
    """Work done by any moment, in seconds at the usual speed."""

    def __init__(self, marks: Sequence[tuple[float, int]]) -> None:
        self._t: Floats = np.array([t for t, _ in marks])
        which = np.array([mark for _, mark in marks])
        stretch = which[:-1] * (which.max() + 1) + which[1:]
        took = np.diff(self._t)
        _, place = np.unique(stretch, return_inverse=True)
        order = np.argsort(place, kind="stable")
        parts = np.split(took[order], np.cumsum(np.bincount(place))[:-1])
        usual = np.array([np.median(part) for part in parts])
        self._usual: Floats = usual[place]
        self._done: Floats = np.concatenate([[0.0], np.cumsum(self._usual)])

    def dense(self, starts: Floats, ends: Floats) -> NDArray[np.bool_]:
        """Whether marks usually follow each other closely at both ends of each span, however it was this time."""
        last = len(self._usual) - 1
        at = [np.clip(np.searchsorted(self._t, t) - 1, 0, last) for t in (starts, ends)]
        found: NDArray[np.bool_] = (self._usual[at[0]] <= DENSE_SECONDS) & (self._usual[at[1]] <= DENSE_SECONDS)
        return found

    def speed(self, starts: Floats, ends: Floats) -> Floats:
        """Mean speed within each span, in terms of the usual one."""
        done = np.interp(ends, self._t, self._done) - np.interp(starts, self._t, self._done)
        speeds: Floats = done / (ends - starts)
        return speeds


def interval(values: Floats | Sequence[float]) -> tuple[float, float]:
    """Mean, and half its 95 % interval."""
    values = np.asarray(values)
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(half)


def by_blocks(work: Work, blocks: Sequence[tuple[float, float, bool]]) -> tuple[float, float, int]:
    """(cost, half its interval, groups)."""
    logs = [math.log(work.speed(np.array([a]), np.array([b]))[0]) for a, b, _ in blocks]
    groups = [logs[i : i + 4] for i in range(0, len(logs) - 3, 4)]
    return *interval([(b + c - a - d) / 2 for a, b, c, d in groups]), len(groups)


def by_readings(work: Work, readings: Spans, busy: Spans) -> tuple[float, float, int]:
    """(seconds lost in a reading, half its interval, readings), beside stretches that touch nothing in `busy`."""
    spans = np.array(readings)
    starts, ends = spans[:, 0], spans[:, 1] + AFTER_SECONDS
    length = ends - starts
    speed = work.speed(starts, ends)
    begun, over = np.array([a for a, _ in busy]), np.array([b for _, b in busy])
    total, count = np.zeros(len(spans)), np.zeros(len(spans))
    for shift in CONTROLS_SECONDS:
        start = (ends + shift) if shift > 0 else (starts + shift - length)
        # the first busy span that ends after this stretch begins must begin after it ends
        place = np.searchsorted(over, start)
        following = np.where(place < len(begun), begun[np.minimum(place, len(begun) - 1)], np.inf)
        free = (following > start + length) & work.dense(start, start + length)
        total[free] += work.speed(start[free], start[free] + length[free])
        count[free] += 1
    known = (count > 0) & work.dense(starts, ends)
    lost = (total[known] / count[known] - speed[known]) * length[known]
    return *interval(lost), int(known.sum())


def shams(blocks: Sequence[tuple[float, float, bool]], seconds: float) -> Spans:
    """Where readings would have been with the sampler on."""
    moments = [t for a, b, on in blocks if not on for t in np.arange(a + 0.05, b - 0.05, 1 / RATE_HZ)]
    return [(t, t + seconds) for t in moments]


def measured(config: TrialConfig, folder: Path) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    looker = context.Process(target=look, args=(there,), daemon=True)
    looker.start()
    marks, (opened, closed) = train(config, folder)
    here.send("stop")
    readings, blocks, cpu_seconds = here.recv()
    looker.join()
    work = Work([mark for mark in marks if opened <= mark[0] <= closed])
    # whole groups of four within the window
    whole = [blocks[i : i + 4] for i in range(0, len(blocks) - 3, 4)]
    inside = [group for group in whole if group[0][0] > opened and group[-1][1] < closed]
    blocks = [block for group in inside for block in group]
    within = [span for span in readings if opened + 0.1 < span[0] and span[1] < closed - 0.1]
    on_seconds = sum(b - a for a, b, on in blocks if on)
    per_second = sum(any(a <= span[0] < b for a, b, on in blocks if on) for span in within) / on_seconds
    usual = statistics.median(b - a for a, b in within)
    lost, half, count = by_readings(work, within, within)
    sham, sham_half, _ = by_readings(work, shams(blocks, usual), within)
    cost, cost_half, groups = by_blocks(work, blocks)
    # lost work, over what is done in a second: stalls of other causes leave less of that than usual
    share = per_second / work.speed(np.array([opened]), np.array([closed]))[0]
    return {
        "readings": count,
        "reading_seconds": usual,
        "readings_per_second": per_second,
        "cost_of_readings": lost * share,
        "cost_of_readings_half": half * share,
        "sham": sham * share,
        "sham_half": sham_half * share,
        "groups": groups,
        "cost_by_blocks": cost,
        "cost_by_blocks_half": cost_half,
        "cpu_seconds_per_reading": cpu_seconds / len(readings),
        "window_seconds": closed - opened,
        "marks": len(marks),
    }


def main() -> None:
    out = Path(sys.argv[1])
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 200.0
    more = sys.argv[3:]
    command = " ".join(["python -m benchmarks.looking OUT", f"{seconds:g}", *more])
    placement = choose_placement("auto")
    os.environ.update(worker_environment(placement))  # as a worker has it, before torch is imported
    rows = []
    for shape, overrides in SHAPES.items():
        steps = max(20, round(seconds / _GUESSED_STEP_SECONDS))
        config = compose([*COMMON, *overrides, f"measure.steps={steps}", *more])
        rows.append({"shape": shape} | measured(config, Path("multirun/looking").resolve() / shape))
        text = report(out, command, rows, environment() | device_facts(placement))
    print(text)


def report(out: Path, command: str, rows: list[dict[str, Any]], tags: dict[str, str]) -> str:
    origin = provenance(tags, command)
    head = ["shape", "window s", "readings", "a reading takes", "a second"]
    head += ["cost of readings, 95 %", "sham", "cost by blocks, 95 %"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        names = ("cost_of_readings", "sham", "cost_by_blocks")
        costs = [f"{row[name]:+.2%} ± {row[f'{name}_half']:.2%}" for name in names]
        costs[-1] += f" ({row['groups']} groups)"
        cells = [row["shape"], f"{row['window_seconds']:.0f}", str(row["readings"])]
        cells += [f"{row['reading_seconds'] * 1e3:.2f} ms", f"{row['readings_per_second']:.1f}", *costs]
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join(lines)
    write_report(out, "looking", "What looking costs", origin, text, {"rows": rows})
    return text


if __name__ == "__main__":
    main()
