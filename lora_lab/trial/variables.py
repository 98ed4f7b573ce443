"""Environment variables of the processes that trials run in: which are set, and which are removed.

A trial is one process on one device. A launcher (torchrun, accelerate, mpirun, Slurm) may have left variables behind.
They would make accelerate wait for processes that were never started, or give the trial a precision, a device or a
sharding that was not asked for.
"""

import os
import re

from lora_lab.paths import cache_folder
from lora_lab.segments import allocator_variables

_HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "PYTHONUTF8": "1"}
"""Hiding the cards from the server is not enough: a plain `torch.cuda.is_available()` during an import would ask the
driver, which then answers 'no device' in every forked worker too. So NVML is asked instead. Python's UTF-8 mode is for
a C locale, in which torch can't read its own files."""

_NAMES = (
    "RANK",  # torch's rendezvous: which process of how many this is
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",  # from which launchers calculate RANK
    "NNODES",
    "NPROC",
    "FORK_LAUNCHED",  # accelerate's notebook launcher
    "USE_TORCH_XLA",
)
_BEGINNINGS = (
    "MASTER_",  # torch's rendezvous: where the others are
    "GROUP_",  # torchrun
    "ROLE_",
    "TORCHELASTIC_",
    "ACCELERATE_",  # what `accelerate launch` sets: precision, device, FSDP, DeepSpeed, dynamo
    "FSDP_",
    "PARALLELISM_CONFIG_",
    "MEGATRON_LM_",
    "DEEPSPEED_",
    "PMI_",  # MPI: accelerate counts processes by these
    "PMIX_",
    "OMPI_",
    "MV2_",
    "I_MPI_",
    "SLURM_",
    "SM_",  # SageMaker
    "SMDATAPARALLEL_",
    "XLA_",  # TPU: with these, accelerate and transformers calculate in another format
    "PJRT_",
    "TPU_",
)
_LAUNCHER = re.compile(f"({'|'.join(_NAMES)})|({'|'.join(_BEGINNINGS)}).*")


def is_launchers(name: str) -> bool:
    """Return whether an environment variable is one of a launcher's."""
    return _LAUNCHER.fullmatch(name) is not None


def of_server() -> dict[str, str | None]:
    """Return the changes to this process's environment for the server that forks workers; None removes a variable."""
    return {**without_launchers(), **_HIDDEN, **allocator_variables()}


def without_launchers() -> dict[str, str | None]:
    """Return the changes that remove a launcher's variables from this process's environment."""
    return {name: None for name in os.environ if is_launchers(name)}


def of_worker(shown: str) -> dict[str, str]:
    """Return what a worker's environment has besides this process's. One variable is the card that it sees (Trainer
    would use all). Others say where compiled code is kept: torch's own place is under /tmp, which a reboot empties."""
    kept = {
        name: os.environ.get(name) or str(cache_folder() / folder)
        for name, folder in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton"))
    }
    return {"CUDA_VISIBLE_DEVICES": shown, "TOKENIZERS_PARALLELISM": "false", **allocator_variables(), **kept}
