"""What is compared: the cells, the contenders, and the messages between controller and contender. Imports no torch."""

import importlib.util
import re
from dataclasses import dataclass

RANK = 16
ALPHA = 32
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LEARNING_RATE = 2e-4
MAX_GRAD_NORM = 1.0
SEED = 0

OTHER_KERNEL = "plain_other_kernel"
"""Plain Hugging Face with another attention kernel: for the spread of losses alone, not for time."""
OFFLOADED = "graph_offload"
"""Graph with its checkpoints in host memory, where Unsloth has them; in cells with checkpointing alone."""
NEEDS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "liger": ("liger_kernel",),
    "unsloth": ("unsloth", "unsloth_zoo", "trl"),
    "eager": (),
    "compile": (),
    "graph": (),
    OFFLOADED: (),
    "lab_liger": ("liger_kernel",),
    OTHER_KERNEL: (),
}
"""Every contender, and the packages it needs beyond lora_lab's own. lab_liger is lora_lab's engine=liger."""
OWN = ("eager", "compile", "graph", OFFLOADED, "lab_liger")
"""The contenders that are lora_lab's."""
QLORA_NEEDS = ("bitsandbytes",)
CELLS = ("1x512", "2x1024", "2x2048c", "2x2048", "8x2048c", "8x2048")


@dataclass(frozen=True)
class Cell:
    """A shape: rows in a batch, tokens in a row, and whether activations are recomputed (a trailing c)."""

    batch_size: int
    seq_len: int
    checkpointing: bool

    @classmethod
    def parse(cls, text: str) -> "Cell":
        """Raises: ValueError for what is not like 2x2048 or 2x2048c."""
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(c?)", text)
        if not found:
            raise ValueError(f"{text!r} is no cell; one looks like 2x2048, or 2x2048c with checkpointing")
        return cls(int(found[1]), int(found[2]), found[3] == "c")

    @property
    def tokens(self) -> int:
        """Token slots in a step."""
        return self.batch_size * self.seq_len

    def __str__(self) -> str:
        return f"{self.batch_size}x{self.seq_len}{'c' if self.checkpointing else ''}"


@dataclass(frozen=True)
class Setup:
    """What a contender's process loads, once."""

    contender: str
    cell: Cell
    method: str
    """qlora or lora."""
    material: str
    """Folder with model/ and adapters.safetensors, the same for all."""


@dataclass(frozen=True)
class Turn:
    """One Trainer.train()."""

    warmup: int
    """Optimizer steps before the window, 1 at least."""
    steps: int
    """Optimizer steps in the window."""
    compared: int
    """So many first steps have their losses and rows kept for comparison."""
    profiled: bool
    """Watch one more step after the window with torch's profiler."""

    @property
    def total(self) -> int:
        """Optimizer steps in all."""
        return self.warmup + self.steps + self.profiled


def applies(contender: str, cell: Cell) -> bool:
    """Whether a contender is another than those beside it in this cell."""
    return cell.checkpointing or contender != OFFLOADED


def missing_packages(contender: str, method: str) -> list[str]:
    """Packages that a contender needs and this Python does not have."""
    needed = NEEDS[contender] + (QLORA_NEEDS if method == "qlora" else ())
    return [name for name in needed if importlib.util.find_spec(name) is None]
