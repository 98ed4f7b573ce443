"""
Harms workers from outside lora_lab. Python imports this at its start wherever this folder is on PYTHONPATH.

SABOTAGE names a JSON file: `{"0.0003": ["kill", "in data"]}` does `kill` in the trial whose learning_rate is 0.0003,
as soon as it has said that it is in the phase data; with `after step 3`, as soon as it has told that step. The key
`0.0003 rank 1` means one of several workers. `{"patience": ["2", ""]}` is how many seconds a worker may be late.
`{"small card": ["1024", ""]}` lets every trial run as on a card that takes micro-batches of up to 1,024 tokens. The
work is done by the CPU; a larger micro-batch ends as torch's allocator ends it.
"""

import ctypes
import importlib.abc
import importlib.machinery
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

TARGET = "lora_lab.worker.trial"
SLACK_BYTES = 2 * 2**20


def little_memory() -> None:
    """Hardly more address space than the process has now: the next large thing asked for can't be had."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + SLACK_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def huge_tensor() -> None:
    import torch

    torch.empty(10**15)


def huge_array() -> None:
    import numpy as np

    np.empty(10**12)


def starve_quantizer() -> None:
    """Leave no memory to bitsandbytes when it quantizes weights."""
    import bitsandbytes

    bitsandbytes.functional.quantize_4bit = lambda *_, **__: huge_tensor()


def starve_tokenizer() -> None:
    """Leave little memory to a Rust library, which then ends the process."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    text = "word " * 10**6
    little_memory()
    tokenizer.encode(text)


def bail_out() -> None:
    """As bitsandbytes does when CUDA refuses it: a line on standard error, then the end of the process."""
    os.write(2, b"Error out of memory at line 538 in file /src/csrc/pythonInterface.cpp\n")
    os._exit(1)


def hang() -> None:
    while True:
        time.sleep(3600)


def wait() -> None:
    """Go on once the plan is empty."""
    while json.loads(Path(os.environ["SABOTAGE"]).read_text(encoding="utf-8")):
        time.sleep(0.05)


def hang_deaf() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    hang()


def fault() -> None:
    raise RuntimeError("sabotaged")


def poison() -> None:
    """A device assert: from then on nothing works in this process's CUDA context."""
    import torch

    torch.zeros(1, device="cuda")[torch.tensor([5], device="cuda")]
    torch.cuda.synchronize()


def huge_tensor_on_the_card() -> None:
    import torch

    torch.empty(10**13, device="cuda")


def nudge() -> None:
    """Change a trained weight."""
    import gc

    import peft
    import torch

    with torch.no_grad():
        model = next(each for each in gc.get_objects() if isinstance(each, peft.PeftModel))
        next(p for _, p in model.named_parameters() if p.requires_grad).view(-1)[0] += 1e-4


def spike() -> None:
    """Take the loss of step 7 for a spike, the first time."""
    from lora_lab.outcome import Diverged
    from lora_lab.worker import async_losses

    own, seen = async_losses.DivergenceWatch.see, []

    def see(self: Any, step: int, loss: float) -> None:
        own(self, step, loss)
        if step == 7 and not seen:
            seen.append(step)
            raise Diverged("a spike at step 7", 7)

    async_losses.DivergenceWatch.see = see


ACTS: dict[str, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "segmentation fault": lambda: ctypes.string_at(0),
    "little memory": little_memory,
    "huge tensor": huge_tensor,
    "huge array": huge_array,
    "starve quantizer": starve_quantizer,
    "starve tokenizer": starve_tokenizer,
    "bail out": bail_out,
    "hang": hang,
    "wait": wait,
    "hang deaf": hang_deaf,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "nudge": nudge,
    "spike": spike,
    "fault": fault,
    "poison": poison,
    "huge tensor on the card": huge_tensor_on_the_card,
    "exit": lambda: sys.exit(7),
}


def place(event: Any) -> str:
    if type(event).__name__ == "PhaseBegan":
        return f"in {event.phase}"
    return f"after step {event.step}" if type(event).__name__ == "Step" else ""


def on_small_card(run_trial: Callable[..., None], tokens: int) -> Callable[..., None]:
    def run(config: Any, folder: Path, emit: Callable[[Any], None], seat: Any = None, members: Any = ()) -> None:
        from dataclasses import replace

        from lora_lab.worker import trial

        if config.batch_size * config.seq_len > tokens:
            import torch

            def too_much(_: object) -> None:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

            trial.STAGES = [replace(trial.STAGES[0], run=too_much)]
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        run_trial(replace(config, vram_limit_gib=None), folder, emit, seat, members)

    return run


def sabotaged(run_trial: Callable[..., None], plan: dict[str, list[str]]) -> Callable[..., None]:
    if "small card" in plan:
        return on_small_card(run_trial, int(plan["small card"][0]))

    def run(config: Any, folder: Path, emit: Callable[[Any], None], seat: Any = None, members: Any = ()) -> None:
        one = f"{config.learning_rate} rank {0 if seat is None else seat.rank}"
        act, where = plan.get(one) or plan.get(str(config.learning_rate), ["", "nowhere"])
        if "patience" in plan:
            from lora_lab.worker import group

            group._HANGS_SECONDS = float(plan["patience"][0])

        def say(event: Any) -> None:
            emit(event)
            if place(event) == where:
                ACTS[act]()

        run_trial(config, folder, say, seat, members)

    return run


class Saboteur(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets the worker's module be imported as it is, then puts another run_trial in its place."""

    def __init__(self, plan: dict[str, list[str]]) -> None:
        self._plan = plan
        self._loader: importlib.abc.Loader | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if fullname == TARGET else None
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        assert self._loader is not None
        self._loader.exec_module(module)
        module.__dict__["run_trial"] = sabotaged(module.__dict__["run_trial"], self._plan)


if "SABOTAGE" in os.environ:
    harm = json.loads(Path(os.environ["SABOTAGE"]).read_text(encoding="utf-8"))
    sys.meta_path.insert(0, Saboteur(harm))
    if known := sys.modules.get(TARGET):  # in a command that the tests' server has forked
        known.__dict__["run_trial"] = sabotaged(known.__dict__["run_trial"], harm)
