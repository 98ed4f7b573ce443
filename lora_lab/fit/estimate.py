"""Estimate a trial's memory: what is held at the moment at which most is held, part by part."""

from dataclasses import dataclass
from functools import cached_property

from lora_lab.config import TrialConfig
from lora_lab.fit.allocator import OutOfMemory
from lora_lab.fit.compiled_step import compiled_step
from lora_lab.fit.interval import KEPT, Errors, errors_of, larger_measured, smaller_measured
from lora_lab.fit.libraries import Libraries, libraries_of
from lora_lab.fit.loading import load
from lora_lab.fit.optimizer import State, optimizer_state, trained_weights
from lora_lab.fit.plain_step import plain_step
from lora_lab.fit.replay import replay, replay_loading
from lora_lab.fit.shapes import Shapes
from lora_lab.fit.step import GRADIENTS, OPTIMIZER, PARTS, WORKING, sizes_of
from lora_lab.fit.tape import Tape
from lora_lab.options import EngineKind
from lora_lab.segments import are_expandable

GIB = 2**30
_EXCHANGED = 4
"""Bytes of each gradient in the buffer in which several cards exchange them, which stays: worker/shared_step.py."""
FITS, DOUBTFUL, TOO_LARGE = "fits", "doubtful", "too large"
_CLOSE = 200
"""What the allocator gets through with is known to this part of what it takes: a few replays, each of some 20 ms."""
_TRYING_OUT = 2**28
"""What torch.compile takes while it tries out kernels for the first time: in benchmarks.fit_memory, the most that the
first step had more than later ones."""


@dataclass(frozen=True)
class Estimate:
    """A trial's memory in bytes."""

    config: TrialConfig
    shapes: Shapes
    parts: dict[str, int]
    """What is held at the moment at which most is held, see step.PARTS."""
    optimizer: State
    libraries: Libraries
    """The CUDA context and libraries, `vram/other_gib`."""
    errors: Errors
    tape: Tape
    compiling: Tape | None
    """Where the first step compiles: that step, with what trying out kernels takes."""

    @property
    def allocated(self) -> int:
        """Return the peak of live tensors, `vram/peak_allocated_gib`."""
        return sum(self.parts.values())

    @property
    def loading(self) -> int:
        """Return the peak of live tensors while the model is loaded, `vram/load_allocated_gib`."""
        return self.tape.loading_peak()

    @cached_property
    def reserved(self) -> int:
        """Return the peak in training that the allocator takes from the driver where there is enough,
        `vram/peak_reserved_gib`."""
        return replay(self.tape)

    @cached_property
    def ever(self) -> int:
        """Return the same of the whole trial. Loading a mixture in 4 bit takes more than a step."""
        return max(self.reserved, replay_loading(self.tape))

    @cached_property
    def least(self) -> int:
        """Return the least with which the allocator gets through a step, by returning what it has cached. Nothing is
        tried out: what was compiled before is not compiled again."""
        return _least(self.tape)

    @cached_property
    def first(self) -> int:
        """Return what the allocator takes in a first step that compiles; 0 where none does."""
        return 0 if self.compiling is None else replay(self.compiling, times=1)

    @property
    def outside(self) -> int:
        """Return what torch's allocator does not see."""
        return self.libraries.size + self.optimizer.paged

    @property
    def card(self) -> int:
        """Return the most likely peak of the worker's process on a card that has enough."""
        return self.ever + self.outside

    @cached_property
    def low(self) -> int:
        """Return what a card must have at the very least. Paged state can go to host memory. It is never less than for
        a smaller trial that was measured."""
        own = int(self.least * (1 - self.errors.below) + self.libraries.size * (1 - self.libraries.error))
        return max([own, *(self._of(smaller).low for smaller in smaller_measured(self.config))])

    @cached_property
    def enough(self) -> int:
        """Return what a card must have so that it is enough with 95 % certainty, where the allocator returns what it
        has cached. It is never more than for a larger trial that was measured."""
        needs = max(self.least, 0 if self.compiling is None else _least(self.compiling))
        own = int(needs * (1 + self.errors.above) + self._most_outside)
        return min([own, *(larger.enough for larger in self._larger)])

    @cached_property
    def high(self) -> int:
        """Return the upper end of the process' peak on a card that has plenty, where what is cached stays. It is never
        more than for a larger trial that was measured."""
        taken = max(self.ever, self.first)
        own = max(self.enough, int(taken * (1 + self.errors.above + KEPT) + self._most_outside))
        return min([own, *(larger.high for larger in self._larger)])

    @cached_property
    def _larger(self) -> list["Estimate"]:
        return [self._of(larger) for larger in larger_measured(self.config)]

    def _of(self, config: TrialConfig) -> "Estimate":
        return estimate(config, self.shapes, self.tape.is_expandable)

    @property
    def _most_outside(self) -> float:
        return self.libraries.size * (1 + self.libraries.error) + self.optimizer.paged

    def verdict(self, capacity: float) -> str:
        """Return FITS, DOUBTFUL or TOO_LARGE for a card of `capacity` bytes."""
        if self.allocated * (1 - self.errors.below) > capacity:
            return TOO_LARGE  # without a replay
        if self.is_enough(capacity):
            return FITS
        return DOUBTFUL if self.low <= capacity else TOO_LARGE

    def is_enough(self, capacity: float) -> bool:
        """Return whether `enough` is within `capacity`. Where live tensors or what is reserved decide that, the least
        is not looked for."""
        room = (capacity - self._most_outside) / (1 + self.errors.above)
        if self.allocated > room and not self._larger:
            return False
        return max(self.ever, self.first) <= room or self.enough <= capacity


def _least(tape: Tape) -> int:
    """Return the least number of reserved bytes that is enough for loading and a step, to half a percent. torch needs
    room for the whole of a request, though a part of it may be cached; where nothing is returned, that is more than it
    takes in the end."""
    low = max(tape.peak().total(), tape.loading_peak())
    high = max(replay(tape), replay_loading(tape)) + max(tape.sizes)
    close = step = high // _CLOSE
    while high - low > close:
        # upwards in growing steps first: it lies near the live tensors
        middle = min(low + step, (low + high) // 2)
        try:
            replay(tape, middle, times=1)
        except OutOfMemory:
            low, step = middle, 2 * step
        else:
            high = middle
    return high


def tape_of(config: TrialConfig, shapes: Shapes, is_compiling: bool = False) -> tuple[Tape, State]:
    """Write a trial's memory as a tape: what stays, then a step from its forward to the optimizer.

    Args:
        is_compiling: whether kernels are tried out in the step; then the optimizer has no state yet.
    """
    sizes, tape = sizes_of(config, shapes), Tape()
    load(tape, sizes, tries_out=is_compiling and config.engine.kind is EngineKind.graph)
    trained = trained_weights(config.method, shapes)
    if config.placement.kind.shares_trials:
        tape.new(_EXCHANGED * trained.elements, GRADIENTS)
    state = optimizer_state(config.optimizer, trained)
    if is_compiling:
        tape.new(_TRYING_OUT, WORKING)
    for _ in range(0 if is_compiling else shapes.layers):
        tape.new((state.total - state.paged) // shapes.layers, OPTIMIZER)
    tape.loaded = len(tape.events)
    stays = len(tape.sizes)
    if config.engine.kind in (EngineKind.compile, EngineKind.graph):
        compiled_step(tape, sizes)
    else:
        plain_step(tape, sizes)
    if state.working and not is_compiling:
        tape.free(tape.new(state.working, WORKING))
    tape.end(GRADIENTS, after=stays)
    return tape, state


def estimate(config: TrialConfig, shapes: Shapes, expandable: bool | None = None) -> Estimate:
    """Estimate a trial's memory. Rows are taken as full: seq_len tokens each.

    Args:
        expandable: whether the allocator's segments grow; None: as in a trial on this machine.
    """
    tape, state = tape_of(config, shapes)
    compiles = config.engine.kind in (EngineKind.compile, EngineKind.graph)
    compiling = tape_of(config, shapes, is_compiling=True)[0] if compiles else None
    for each in filter(None, (tape, compiling)):
        each.is_expandable = are_expandable() if expandable is None else expandable
    held = tape.peak()
    return Estimate(
        config=config,
        shapes=shapes,
        parts={part: held[part] for part in PARTS},
        optimizer=state,
        libraries=libraries_of(config),
        errors=errors_of(config, shapes),
        tape=tape,
        compiling=compiling,
    )
