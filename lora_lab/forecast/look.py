"""Look at a trial's rows, model and device in another process, which alone imports torch."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

from lora_lab.config import TrialConfig
from lora_lab.placement import Placement
from lora_lab.trial.device_lock import device_lock
from lora_lab.trial.devices import worker_environment
from lora_lab.work import DeviceRates, Workload
from lora_lab.worker.workload import workload


def look(
    config: TrialConfig, placement: Placement, waiting: Callable[[str], None] | None
) -> tuple[Workload, DeviceRates | None]:
    """Return the work of a trial and the rates of its device. What is not known yet is measured, in seconds.

    Args:
        waiting: gets a text while another trial holds the device; None to look at no device, and return no rates.

    Raises: InvalidInput, BrokenProcessPool."""
    os.environ.update(worker_environment(placement))  # of this process, for the one it starts
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_be_quiet) as pool:
        work = pool.submit(workload, config).result()
        if waiting is None:
            return work, None
        rates = pool.submit(_known, config).result()
        if rates is None:
            with device_lock(placement, config.share_device, waiting):
                rates = pool.submit(_measured, config).result()
    return work, rates


def _known(config: TrialConfig) -> DeviceRates | None:
    from lora_lab.worker.memory_rate import known_rates

    return known_rates(config)


def _measured(config: TrialConfig) -> DeviceRates:
    from lora_lab.worker.memory_rate import measured_rates

    return measured_rates(config)


def _be_quiet() -> None:
    """Drop what libraries print in the worker."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
