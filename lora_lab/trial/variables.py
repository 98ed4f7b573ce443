"""Environment variables of the processes that trials run in: those we set, and those we take out.

A trial is one process on one device. A variable that a launcher (torchrun, accelerate, mpirun, Slurm) left behind would
make accelerate wait for processes that nobody started, or give the trial a precision, a device or a sharding that
nobody asked for.
"""

import os
import re

from lora_lab.paths import cache_folder

_HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "PYTHONUTF8": "1"}
"""Hiding the cards from the server is not enough: a plain `torch.cuda.is_available()` at some import would ask the
driver, which then answers 'no device' in every forked worker too. NVML is asked instead. Python's UTF-8 mode is for a C
locale, in which torch can't read its own files."""

_NAMES = (
    "RANK",  # torch's rendezvous: which process of how many this is
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",  # what launchers make RANK of
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
    "XLA_",  # TPU: accelerate and transformers calculate in another format by these
    "PJRT_",
    "TPU_",
)
_LAUNCHER = re.compile(f"({'|'.join(_NAMES)})|({'|'.join(_BEGINNINGS)}).*")


def is_launchers(name: str) -> bool:
    """Whether an environment variable says what a process is part of."""
    return _LAUNCHER.fullmatch(name) is not None


def of_server() -> dict[str, str | None]:
    """How the environment of the server that workers are forked from differs from this process's; None takes out."""
    return {**without_launchers(), **_HIDDEN}


def without_launchers() -> dict[str, str | None]:
    """The changes that take a launcher's variables out of this process's environment."""
    return {name: None for name in os.environ if is_launchers(name)}


def of_worker(shown: str) -> dict[str, str]:
    """What a worker has beyond the server's: the card that it is shown (Trainer would use all), and where compiled code
    is kept: torch's own place is under /tmp, which a reboot empties."""
    kept = {
        name: os.environ.get(name) or str(cache_folder() / folder)
        for name, folder in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton"))
    }
    return {"CUDA_VISIBLE_DEVICES": shown, "TOKENIZERS_PARALLELISM": "false"} | kept
