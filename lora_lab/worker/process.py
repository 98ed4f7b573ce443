"""Start a worker process: environment, log file, connection; then the trial."""

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path

from lora_lab.config import TrialConfig
from lora_lab.cotrain import Member
from lora_lab.events import Event, Ready, encode
from lora_lab.machine import CORES
from lora_lab.seat import Seat


def main(
    connection: Connection,
    config: TrialConfig,
    environment: dict[str, str],
    folder: Path,
    seat: Seat | None = None,
    members: Sequence[Member] = (),
) -> None:
    """Run one trial in this process and send its events.

    Args:
        connection: takes one encoded event a message.
        environment: set before anything looks for a GPU.
        folder: gets worker.log (everything printed) and the adapter; of several workers each has a log of its own.
        seat: this worker's among those that share the trial; None for a worker alone.
        members: the trials that train together; none for a trial alone.
    """
    _begin(environment, (Seat() if seat is None else seat).log(folder))
    _keep_to_cores(environment.get(CORES))

    def emit(event: Event) -> None:
        connection.send_bytes(encode(event).encode())

    prepared = "transformers.trainer" in sys.modules and "bitsandbytes" not in sys.modules
    emit(Ready(t=time.monotonic(), pid=os.getpid(), prepared=prepared))
    if prepared:
        forget_hidden_gpus()
    from lora_lab.worker.trial import run_trial

    run_trial(config, folder, emit, seat, members)
    connection.close()


def _keep_to_cores(cores: str | None) -> None:
    """Stay on these cores, with no more threads than there are of them. Torch has counted all cores by now, and it
    reads OMP_NUM_THREADS only while it is imported.

    Args:
        cores: their numbers, separated by commas; None leaves everything as it is.
    """
    if cores is None:
        return
    share = {int(core) for core in cores.split(",")}
    os.sched_setaffinity(0, share)
    import torch

    torch.set_num_threads(min(len(share), torch.get_num_threads()))


def check(connection: Connection, configs: list[TrialConfig], log: Path, works: bool) -> None:
    """Look at many trials in this process, on the CPU.

    Args:
        connection: takes one Look a trial.
        works: whether to count each trial's work, too.
    """
    _begin({"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}, log)
    from lora_lab.worker.check import check_trials
    from lora_lab.worker.works import Works

    for look in check_trials(configs, Works().of if works else None):
        connection.send(look)
    connection.close()


def _begin(environment: dict[str, str], log: Path) -> None:
    _die_with_parent()
    os.environ.update(environment)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _die_with_parent() -> None:
    """End this process with its parent. Else it would go on training on the card, unseen."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def forget_hidden_gpus() -> None:
    """Clear answers that were cached while the GPUs were hidden: transformers', and torch's about Triton. A library
    that transformers imports if installed (torchao) asks for Triton; with the cached answer torch compiles nothing."""
    from torch.utils import _triton
    from transformers.utils import import_utils

    asked = [function for name, function in vars(import_utils).items() if name.startswith("is_")]
    for function in (*asked, *vars(_triton).values()):
        if hasattr(function, "cache_clear"):
            function.cache_clear()
