"""Variables by which a launcher (torchrun, accelerate, mpirun, Slurm) says what a process is part of.

A trial is one process on one device. A variable that a launcher left behind would make accelerate wait for
processes that nobody started, or give the trial a precision, a device or a sharding that nobody asked for.
"""

import os
import re

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


def without_launchers() -> dict[str, None]:
    """The changes that take such variables out of this process's environment."""
    return {name: None for name in os.environ if is_launchers(name)}
