"""Calculate an optimizer's state by its own rule."""

from dataclasses import dataclass, replace

from lora_lab.fit.shapes import Shapes, blocks_of
from lora_lab.fit.weights import SCALES_BLOCK, adapter_sides, adapter_sizes, trains_all
from lora_lab.method_config import MethodConfig, OptimizerConfig
from lora_lab.options import DType, Projection

_SMALL_STATE = 4096
"""bitsandbytes, torchao and our AdamW in 8 bit keep the state of a parameter with fewer elements in fp32."""
_PIECE = 1 << 24
"""Elements that worker/pieces.py gives an optimizer together, and that worker/rounding.py rounds together, with a
random number and a truth value each."""
_BY_ELEMENT = ("adamw_torch", "adamw_torch_fused")
"""Optimizers that get such pieces where weights are held in bf16; torchao's always do."""
_TORCHAO_WORKING = {8: 12, 4: 26}
"""Bytes that their compiled kernels take in addition for each of these elements, by the bits of the state, as seen on
an H200 with weights in one piece."""
OURS = "lora_lab.worker.adamw_8bit.AdamW8bit"
"""AdamW in 8 bit whose kernel rounds weights in bf16, as that of plain gradient descent does."""
_PAGED_FROM = 100_000
"""bitsandbytes pages the state of a parameter with at least as many elements."""


@dataclass(frozen=True, slots=True)
class State:
    """An optimizer's state in bytes."""

    total: int
    paged: int
    """The part in managed memory, which torch's allocator does not see."""
    working: int
    """What a step takes in addition."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What is trained of a whole model."""

    sizes: list[int]
    """Elements of each parameter."""
    sides: list[tuple[int, int]]
    """Rows and columns of those that are matrices, for optimizer states that are factored."""
    embeddings: int = 0
    """Elements of the input embeddings, the first of the parameters; 0 where they are not trained."""
    is_rounded: bool = False
    """Whether it is held in bf16, so that a step takes copies in fp32."""
    tables: int = 0
    """How many of the parameters, the first ones, are embeddings and head."""

    @property
    def elements(self) -> int:
        """Return the elements of all parameters."""
        return sum(self.sizes)


def trained_weights(method: MethodConfig, shapes: Shapes) -> Trained:
    """Return what a method trains of a model: adapters, or every weight."""
    if not trains_all(method):
        return Trained(shapes.layers * adapter_sizes(method, shapes), shapes.layers * adapter_sides(method, shapes))
    table = (shapes.vocabulary, shapes.hidden)
    tables = [table] if shapes.is_tied else [table, table]
    layer = [(linear.outputs, linear.inputs) for linear in shapes.linears]
    vectors = [linear.outputs for linear in shapes.linears if linear.bias] + [shapes.hidden] * shapes.layer_norms
    vectors += [shapes.head_size] * 2 if shapes.head_norm_weights else []
    sides = tables + shapes.layers * layer
    return Trained(
        sizes=[rows * columns for rows, columns in sides] + shapes.layers * vectors + [shapes.hidden],
        sides=sides,
        embeddings=shapes.vocabulary * shapes.hidden,
        is_rounded=method.held_in is DType.bf16,
        tables=len(tables),
    )


def optimizer_state(optimizer: OptimizerConfig, trained: Trained) -> State:
    """Calculate an optimizer's state, by the optimizer's own rule."""
    state = _projected_state(optimizer, trained)
    if not trained.is_rounded or optimizer.optim in _TORCHAO or rounds_in_our_kernel(optimizer):
        return state
    largest = max(trained.sizes)
    together = min(largest, _PIECE)
    copied = together if optimizer.projection is None and optimizer.optim in _BY_ELEMENT else largest
    return replace(state, working=state.working + 8 * copied + 5 * together)


def rounds_in_our_kernel(optimizer: OptimizerConfig) -> bool:
    """Return whether weights in bf16 are updated and rounded by one kernel of our own."""
    return optimizer.projection is None and (optimizer.optim == "sgd" or optimizer.target == OURS)


def _projected_state(optimizer: OptimizerConfig, trained: Trained) -> State:
    if optimizer.projection is not None:
        low, bases = _projected(optimizer, trained)
        state = _of(optimizer, low)
        return replace(state, total=state.total + 4 * bases)
    return _of(optimizer, trained)


def _projected(optimizer: OptimizerConfig, trained: Trained) -> tuple[Trained, int]:
    """Return what the state is kept for, and the elements of the projections that are kept, as worker/low_rank.py."""
    rank, tables = optimizer.projection_rank, trained.tables
    layers = trained.sides[tables:]
    wide = [sides for sides in layers if min(sides) > rank]
    sides = [(rank, max(each)) if min(each) > rank else each for each in layers]
    vectors = trained.sizes[len(trained.sides) :]
    tables_sides = trained.sides[:tables]
    sizes = [rows * columns for rows, columns in [*tables_sides, *sides]] + vectors
    bases = sum(rank * min(each) for each in wide) if optimizer.projection is Projection.galore else 0
    return replace(trained, sizes=sizes, sides=[*tables_sides, *sides]), bases


def _of(optimizer: OptimizerConfig, trained: Trained) -> State:
    name, elements = optimizer.optim or optimizer.target or "", trained.elements
    one_by_one = optimizer.in_backward or trained.is_rounded
    at_once = max(trained.sizes, default=0) if one_by_one else elements
    if name in ("adamw_torch", "adamw_torch_fused", "adamw_hf"):
        # without the fused kernel the root of the second moment exists for all parameters at once
        return State(8 * elements, 0, 0 if name.endswith("fused") else 4 * at_once)
    if name in _STATES:
        return _of_bitsandbytes(*_STATES[name], pages(optimizer), trained)
    if name in _TORCHAO:
        return _of_torchao(_TORCHAO[name], trained)
    if name == OURS:
        return _of_ours(trained)
    if name == "adafactor" or name.endswith(".Adafactor"):
        factored = sum(rows + columns for rows, columns in trained.sides)
        whole = elements - sum(rows * columns for rows, columns in trained.sides)
        return State(4 * (factored + whole), 0, 8 * max(trained.sizes, default=0))
    if name.endswith(".SGD") or name == "sgd":
        return State(4 * elements if optimizer.args.get("momentum") else 0, 0, 0)
    return State(8 * elements, 0, 4 * at_once)


def _of_ours(trained: Trained) -> State:
    """Calculate the state of worker/adamw_8bit.py: codes and a scale for each block. Small weights keep fp32, and where
    they are in bf16 a step takes copies of them, of their gradients, and what rounding them needs."""
    coded = [size for size in trained.sizes if size >= _SMALL_STATE and size % SCALES_BLOCK == 0]
    small = trained.elements - sum(coded)
    total = sum(2 * (size + 4 * size // SCALES_BLOCK) for size in coded) + 8 * small
    return State(total, 0, 19 * small if trained.is_rounded else 0)


def _of_torchao(bits: int, trained: Trained) -> State:
    """Calculate the state of torchao's optimizers: codes, a scale for each block, and a map of the codes."""
    total = 0
    for size in trained.sizes:
        if size < _SMALL_STATE or size % SCALES_BLOCK:
            total += 8 * size
        else:
            total += 2 * (size * bits // 8 + 4 * size // SCALES_BLOCK + 4 * 2**bits)
    return State(total, 0, _TORCHAO_WORKING[bits] * min(_PIECE, max(trained.sizes, default=0)))


def _of_bitsandbytes(moments: int, bits: int, is_paged: bool, trained: Trained) -> State:
    """Calculate the state of bitsandbytes' optimizers. transformers has it keep that of embeddings in fp32."""
    total = paged = 0
    embeddings = [trained.embeddings] if trained.embeddings else []
    others = trained.sizes[len(embeddings) :]
    for size, is_table in [*((size, True) for size in embeddings), *((size, False) for size in others)]:
        whole = bits == 32 or size < _SMALL_STATE or is_table
        held = moments * size * (4 if whole else 1)
        paged += held if is_paged and size >= _PAGED_FROM else 0
        total += held + (0 if whole else moments * 4 * blocks_of(size, SCALES_BLOCK))
    return State(total, paged, 0)


def pages(optimizer: OptimizerConfig) -> bool:
    """Return whether bitsandbytes keeps the optimizer's state in managed memory."""
    return (optimizer.optim or "").startswith("paged_")


def is_known(optimizer: OptimizerConfig) -> bool:
    """Return whether the optimizer's rule is known here; otherwise it is taken for AdamW."""
    name = optimizer.optim or optimizer.target or ""
    known = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adafactor", "sgd", OURS, *_STATES, *_TORCHAO)
    return name in known or name.endswith((".SGD", ".Adafactor"))


_STATES = {
    "adamw_bnb_8bit": (2, 8),
    "adamw_8bit": (2, 8),
    "paged_adamw_8bit": (2, 8),
    "paged_adamw_32bit": (2, 32),
    "lion_8bit": (1, 8),
    "lion_32bit": (1, 32),
    "paged_lion_8bit": (1, 8),
    "paged_lion_32bit": (1, 32),
}
"""bitsandbytes' optimizers: moments of each element, and bits of each moment."""

_TORCHAO = {"adamw_torch_4bit": 4, "adamw_torch_8bit": 8}
"""torchao's optimizers, and bits of each moment."""
