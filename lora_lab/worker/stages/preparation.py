"""Choose the device, check what it must be able to do, and measure how fast it multiplies."""

import os

import torch
import transformers

from lora_lab.config import TrialConfig
from lora_lab.matmul_cache import load_rate, store_rate
from lora_lab.options import Attention, Quantization
from lora_lab.outcome import Unsupported
from lora_lab.phase import Phase
from lora_lab.worker.matmul_rate import measure_matmul_rate, rate_key
from lora_lab.worker.models import working_dtype
from lora_lab.worker.stages.stage import Stage, TrialContext
from lora_lab.worker.training import check_optimizer
from lora_lab.worker.vram_limit import VramLimit


def _prepare(trial: TrialContext) -> None:
    config, device = trial.config, _device()
    trial.device = device
    trial.clock.vram_limit = VramLimit(config.vram_limit_gib, device)
    _check_machine(config, device)
    trial.group.connect(device)
    if device.type == "cpu" and trial.group.is_shared and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // trial.group.world_size))
    if trial.group.is_lead and not config.share_device:  # other processes would take part of the rate
        _report_matmul_rate(trial)
    transformers.set_seed(config.seed)


def _device() -> torch.device:
    """Return the one card that CUDA_VISIBLE_DEVICES shows, or the CPU when the variable is set and empty.

    Raises: RuntimeError when a card is shown that torch does not see. The trial would train on the CPU without a word.
    """
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown == "":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError(f"CUDA_VISIBLE_DEVICES={shown}, but torch sees no GPU; is this torch a CUDA build?")
    return torch.device("cuda", 0)


def _check_machine(config: TrialConfig, device: torch.device) -> None:
    """Raise for what is wrong whatever the data and the model are."""
    check_optimizer(config.optimizer)
    if config.attention is Attention.flash_attention_2 and not transformers.utils.is_flash_attn_2_available():
        raise Unsupported("attention=flash_attention_2 needs the package flash-attn and a GPU; use attention=sdpa.")
    needs_bitsandbytes = config.method.quantization is not Quantization.none or "bit" in (config.optimizer.optim or "")
    if needs_bitsandbytes and device.type == "cuda":
        import bitsandbytes

        # it chooses its side while being imported, for good: see worker/preload.py
        if not getattr(bitsandbytes.cextension.lib, "compiled_with_cuda", False):
            raise RuntimeError(
                "bitsandbytes runs its CPU side although a GPU is there; 4-bit and 8-bit work would be wrong."
            )


def _report_matmul_rate(trial: TrialContext) -> None:
    """Send how fast the device multiplies. The rate is measured once for a device and a precision, then remembered."""
    dtype = working_dtype(trial.config.precision.dtype, trial.device)
    key = rate_key(trial.device, dtype)
    rate = load_rate(key)
    if rate is None:
        trial.clock.enter(Phase.matmul_rate)
        rate = measure_matmul_rate(trial.device, dtype)
        store_rate(key, rate)
    trial.emit(rate)


STAGE = Stage(Phase.start, _prepare)
