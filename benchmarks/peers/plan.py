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

MANY_STEPS = 30
"""A window of this many steps need not last longer than the energy counter needs."""
MOST_STEPS = 400
"""No window is longer, however short the steps."""
SHORTEST_ENERGY_SECONDS = 2.0
"""In a shorter window the energy counter's ticks are more than a twentieth of the energy."""
PROFILED_STEPS = 3
MADE = "made"
"""The file that says that a folder of material is whole."""

TUTORIAL = "plain_tutorial"
"""Hugging Face by PEFT's tutorials: prepare_model_for_kbit_training raises embeddings, head and norms to fp32."""
UNSLOTH = "unsloth"
"""Unsloth with its own default checkpointing, in every cell."""
UNSLOTH_LEAN = "unsloth_lean"
"""Unsloth with its own switch for embeddings on the host."""
UNSLOTH_TILED = "unsloth_tiled"
"""The same, with its own switch for the MLP in tiles."""
UNSLOTH_NO_CHECKPOINTING = "unsloth_no_checkpointing"
OTHER_KERNEL = "plain_other_kernel"
"""Plain Hugging Face with another attention kernel: for the spread of losses alone, not for time."""
OFFLOADED = "graph_offload"
"""Graph with its checkpoints in host memory, where Unsloth has them."""
LEAN = "graph_lean"
"""Graph with memory=lean: checkpoints and embeddings in host memory."""
TILED = "graph_tiled"
"""The same, and the MLP over a part of the tokens at a time."""
SMALLER = (OFFLOADED, LEAN, TILED)
"""Graph with checkpoints in host memory."""
_UNSLOTH_NEEDS = ("unsloth", "unsloth_zoo", "trl")
NEEDS: dict[str, tuple[str, ...]] = {
    "plain": (),
    TUTORIAL: (),
    "liger": ("liger_kernel",),
    UNSLOTH: _UNSLOTH_NEEDS,
    UNSLOTH_LEAN: _UNSLOTH_NEEDS,
    UNSLOTH_TILED: _UNSLOTH_NEEDS,
    UNSLOTH_NO_CHECKPOINTING: _UNSLOTH_NEEDS,
    "graph": (),
    "eager": (),
    "compile": (),
    OFFLOADED: (),
    LEAN: (),
    TILED: (),
    "lab_liger": ("liger_kernel",),
    OTHER_KERNEL: (),
}
"""Every contender, and the packages it needs beyond lora_lab's own. lab_liger is lora_lab's engine=liger."""
DEFAULT_CONTENDERS = ("plain", TUTORIAL, "liger", UNSLOTH, UNSLOTH_NO_CHECKPOINTING, "graph")
QLORA_NEEDS = ("bitsandbytes",)
CELLS = ("1x512", "2x2048", "8x2048c", "8x2048", "8x2048cp")


@dataclass(frozen=True)
class Cell:
    """A shape: rows in a batch, slots in a row, and two choices.

    A trailing c recomputes activations. A trailing p packs documents of real lengths into each row; otherwise a row
    is one document that fills it.
    """

    batch_size: int
    seq_len: int
    checkpointing: bool
    packed: bool

    @classmethod
    def parse(cls, text: str) -> "Cell":
        """Read 2x2048, 2x2048c, 2x2048p or 2x2048cp.

        Raises: ValueError for anything else.
        """
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(c?)(p?)", text)
        if not found:
            raise ValueError(
                f"{text!r} is not a cell; one looks like 2x2048, 2x2048c (checkpointing) or 2x2048cp (and packed rows)"
            )
        return cls(int(found[1]), int(found[2]), found[3] == "c", found[4] == "p")

    def __str__(self) -> str:
        return f"{self.batch_size}x{self.seq_len}{'c' if self.checkpointing else ''}{'p' if self.packed else ''}"


@dataclass(frozen=True)
class Setup:
    """What a contender's process loads, once."""

    contender: str
    cell: Cell
    method: str
    """qlora or lora."""
    material: str
    """Folder with model/ and adapters.safetensors, the same for all."""
    rank: int = RANK
    optim: str = "adamw_torch_fused"
    """In transformers' words."""


@dataclass(frozen=True)
class Turn:
    """One Trainer.train()."""

    warmup: int
    """Optimizer steps before the window, 1 at least."""
    least: int
    """Optimizer steps in the window, at least."""
    seconds: float
    """The window is long enough after this time; see `enough`."""
    compared: int
    """First steps whose losses and rows are kept for comparison."""
    profiled: int
    """Steps after the window that torch's profiler watches."""

    @property
    def most(self) -> int:
        """Optimizer steps in all, at most."""
        return self.warmup + MOST_STEPS + self.profiled

    def enough(self, steps: int, seconds: float) -> bool:
        """Return whether a window of these steps and seconds is long enough.

        It is after `seconds`, or after 30 steps that took as long as the energy counter needs, whichever comes first.
        """
        long_enough = seconds >= self.seconds or (steps >= MANY_STEPS and seconds >= SHORTEST_ENERGY_SECONDS)
        return steps >= MOST_STEPS or (steps >= self.least and long_enough)


def applies(contender: str, cell: Cell, method: str) -> bool:
    """Return whether a contender differs from the others in this cell and method."""
    if contender == TUTORIAL:
        return method == "qlora"
    if contender == UNSLOTH_NO_CHECKPOINTING:
        return not cell.checkpointing
    return cell.checkpointing or contender not in (*SMALLER, UNSLOTH_LEAN, UNSLOTH_TILED)


def missing_packages(contender: str, method: str) -> list[str]:
    """Return the packages that a contender needs and this Python does not have."""
    needed = NEEDS[contender] + (QLORA_NEEDS if method == "qlora" else ())
    return [name for name in needed if importlib.util.find_spec(name) is None]
