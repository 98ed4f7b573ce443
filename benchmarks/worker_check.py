"""Is a prepared worker the same as a fresh interpreter? Step time and kernels of both, on a GPU.

    python -m benchmarks.worker_check OUT [override ...]

A prepared worker is forked from a server that imported transformers and peft with the GPUs hidden and
bitsandbytes kept away (lora_lab/worker/preload.py). If bitsandbytes then ran its CPU side, or another
attention kernel were chosen, it would show here. Each side runs once with torch's profiler, for the kernels,
and alternately without, for the time.
"""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.compose import compose
from lora_lab.config import TrialConfig
from lora_lab.events import Ended, Event, Ran, Step, WindowOpened
from lora_lab.trial import worker_process
from lora_lab.trial.devices import choose_placement, worker_environment

OVERRIDES = ["optimizer=paged_adamw", "precision=fp16", "method=qlora", "tracking=none"]
REPEATS = 2


def observe(config: TrialConfig, profiled: bool) -> dict[str, Any]:
    """Run the trial in this very process; says what ran, how fast, and with `profiled` which kernels."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from lora_lab.worker.trial import run_trial

    events: list[Event] = []
    with tempfile.TemporaryDirectory() as folder:
        if profiled:
            activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
            with profile(activities=[activity]) as profiler:
                run_trial(config, Path(folder), events.append)
            kernels = {e.key: e.count for e in profiler.key_averages() if e.self_device_time_total > 0}
        else:
            run_trial(config, Path(folder), events.append)
            kernels = {}
    opened = next((e.after_step for e in events if isinstance(e, WindowOpened)), 0)
    seconds = [e.seconds for e in events if isinstance(e, Step) and e.step > opened and e.seconds]
    ended = next(e for e in events if isinstance(e, Ended))
    return {
        "prepared": os.environ.get("LORA_LAB_CHECK") != "fresh",
        "outcome": ended.outcome,
        "reason": ended.reason,
        "step_seconds_p50": statistics.median(seconds) if seconds else None,
        "facts": next((e.facts for e in events if isinstance(e, Ran)), {}),
        "kernels": kernels,
    }


def in_prepared(connection: Connection, config: TrialConfig, environment: dict[str, str], profiled: bool) -> None:
    os.environ.update(environment)
    assert "transformers.trainer" in sys.modules, "the forkserver's preload failed"
    assert "bitsandbytes" not in sys.modules, "bitsandbytes was imported with the GPUs hidden"
    from lora_lab.worker.process import forget_hidden_gpus

    forget_hidden_gpus()
    connection.send(observe(config, profiled))


def prepared(config: TrialConfig, environment: dict[str, str], profiled: bool) -> dict[str, Any]:
    worker_process.prepare()
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=in_prepared, args=(sender, config, environment, profiled))
    worker.start()
    sender.close()
    seen: dict[str, Any] = receiver.recv()
    worker.join()
    return seen


def fresh(overrides: list[str], environment: dict[str, str], profiled: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.worker_check", "--fresh", str(int(profiled)), *overrides]
    environment = {**os.environ, **environment, "LORA_LAB_CHECK": "fresh"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


def main() -> None:
    if sys.argv[1] == "--fresh":
        print(json.dumps(observe(compose([*OVERRIDES, *sys.argv[3:]]), sys.argv[2] == "1")))
        return
    out, overrides = Path(sys.argv[1]), sys.argv[2:]
    environment = worker_environment(choose_placement("auto"))
    config = compose([*OVERRIDES, *overrides])
    a, b = prepared(config, environment, True), fresh(overrides, environment, True)
    times: dict[str, list[float]] = {"prepared": [], "fresh": []}
    for _ in range(REPEATS):
        times["prepared"].append(prepared(config, environment, False)["step_seconds_p50"])
        times["fresh"].append(fresh(overrides, environment, False)["step_seconds_p50"])
    differ = {k: (a["kernels"].get(k, 0), b["kernels"].get(k, 0)) for k in a["kernels"].keys() | b["kernels"].keys()}
    differ = {k: v for k, v in differ.items() if v[0] != v[1]}
    facts_differ = {k: (a["facts"].get(k), v) for k, v in b["facts"].items() if a["facts"].get(k) != v}
    result = {
        "overrides": [*OVERRIDES, *overrides],
        "outcomes": [a["outcome"], b["outcome"], a["reason"], b["reason"]],
        "step_seconds_p50": times,
        "ratio_of_medians": statistics.median(times["prepared"]) / statistics.median(times["fresh"]),
        "kernel_names": len(a["kernels"]),
        "kernel_counts_that_differ": differ,
        "facts_that_differ": facts_differ,
        "facts": a["facts"],
        "kernels": a["kernels"],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "worker_check.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in result.items() if k != "kernels"}, indent=1))


if __name__ == "__main__":
    main()
