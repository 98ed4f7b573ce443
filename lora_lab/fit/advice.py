"""Say what to change so that a trial fits, the cheapest change first."""

import bisect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

from lora_lab.composition.validation import faults
from lora_lab.config import ALL, TrialConfig
from lora_lab.fit.check import model_fault
from lora_lab.fit.estimate import estimate
from lora_lab.fit.search import Search
from lora_lab.fit.shapes import Shapes
from lora_lab.options import Checkpointing, DType, EngineKind, Init, MethodKind, Quantization

_IN_FP32 = ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit")
_LEAST_RANK = 8
_TILE_TOKENS = 4096
_ALL_LAYERS = f"engine.host_layers={ALL}"
_SEARCHED = 5
"""Ways to train for which the longest rows are looked for: those that hold least."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change of settings."""

    override: str
    """What to type."""
    cost: str
    """What it costs, in words."""
    config: TrialConfig


Make = Callable[[TrialConfig], Change | None]
"""Makes a change of a configuration; None where it has nothing to change."""


def advise(
    config: TrialConfig, shapes: Shapes, capacity: float, runs_here: Callable[[TrialConfig], bool] = lambda _: True
) -> list[Change]:
    """Return the changes that together make a trial fit with certainty; empty where those known here do not.

    First come all combinations of changes that leave alone what is learnt, the fewest changes first, then the same with
    an MLP in tiles. Where no combination is enough, layers in host memory are added to the leanest ones. Then come 4
    bit and a smaller rank. At last rows are shortened as well.

    Args:
        capacity: of the card, in bytes.
        runs_here: whether the machine has what a changed trial needs; by default everything is there.
    """

    def fits(changed: TrialConfig) -> bool:
        return estimate(changed, shapes).is_enough(capacity)

    def is_refused(changed: TrialConfig) -> bool:
        return bool(model_fault(changed, shapes) or faults(changed)) or not runs_here(changed)

    least: dict[tuple[EngineKind, Checkpointing], tuple[int, list[Make]]] = {}
    for group in _FURTHER:
        for makes in ([*spared, *further] for further in group for spared in _SPARED):
            changed, changes = _applied(config, makes)
            if len(changes) < len(makes) or is_refused(changed):
                continue
            found = estimate(changed, shapes)
            if found.is_enough(capacity):
                return changes
            way = changed.engine.kind, changed.gradient_checkpointing
            if way not in least or found.allocated < least[way][0]:
                least[way] = found.allocated, makes
        for makes in _leanest(least):
            changed, changes = _applied(config, [*makes, _host_layers])
            if len(changes) > len(makes) and not is_refused(changed) and fits(changed):
                needed = _needed([*makes, _host_layers], lambda some: fits(_applied(config, some)[0]))
                return _with_fewest_layers(_applied(config, needed)[1], shapes.layers, fits)
    shorter, taken = 0, list[Make]()
    for further in ([], [_host_layers]):
        for makes in ([*makes, *further] for makes in _leanest(least)):
            length = Search(_applied(config, makes)[0], shapes).largest("seq_len", capacity, certain=True)
            shorter, taken = (length, makes) if length > shorter else (shorter, taken)
        if shorter:
            break
    else:
        return []
    cut = replace(config, seq_len=shorter)
    taken = _needed(taken, lambda some: not is_refused(_applied(cut, some)[0]) and fits(_applied(cut, some)[0]))
    now, changes = _applied(cut, taken)
    return [*changes, Change(f"seq_len={shorter}", "longer rows are cut", now)]


def _leanest(least: dict[tuple[EngineKind, Checkpointing], tuple[int, list[Make]]]) -> list[list[Make]]:
    return [makes for _, makes in sorted(least.values(), key=lambda each: each[0])[:_SEARCHED]]


def _needed(makes: list[Make], is_enough: Callable[[list[Make]], bool]) -> list[Make]:
    """Leave out every change without which the others are enough."""
    for make in makes:
        others = [other for other in makes if other is not make]
        makes = others if is_enough(others) else makes
    return makes


def _with_fewest_layers(changes: list[Change], layers: int, fits: Callable[[TrialConfig], bool]) -> list[Change]:
    """Replace `engine.host_layers=all`, where it is the last change, by the fewest layers that are enough."""
    if not changes or changes[-1].override != _ALL_LAYERS:
        return changes
    last = changes[-1]

    def change(number: int) -> Change:
        return replace(last, override=f"engine.host_layers={number}", config=_hosting(last.config, number))

    enough = bisect.bisect_left(range(layers), True, lo=1, key=lambda number: fits(change(number).config))
    return changes if enough == layers else [*changes[:-1], change(enough)]


def _applied(config: TrialConfig, makes: list[Make]) -> tuple[TrialConfig, list[Change]]:
    """Apply changes one after the other, but for those that have nothing to change."""
    changes = []
    for make in makes:
        change = make(config)
        if change is not None:
            changes.append(change)
            config = change.config
    return config, changes


def _chunked_loss(config: TrialConfig) -> Change | None:
    if config.engine.chunked_loss:
        return None
    engine = replace(config.engine, chunked_loss=True)
    return Change("engine.chunked_loss=true", "the same loss, a few logits at a time", replace(config, engine=engine))


def _engine(kind: EngineKind, cost: str) -> Make:
    def make(config: TrialConfig) -> Change | None:
        if config.engine.kind is kind:
            return None
        engine = replace(config.engine, kind=kind, chunked_loss=True)
        # what was typed stays: another engine has whole logits only where somebody asked for them
        kept = config.engine.kind is not EngineKind.eager and not config.engine.chunked_loss
        override = f"engine={kind.name}" + (" engine.chunked_loss=true" if kept else "")
        return Change(override, cost, replace(config, engine=engine))

    return make


def _host_embeddings(config: TrialConfig) -> Change | None:
    if config.engine.host_embeddings is not False:
        return None
    engine = replace(config.engine, host_embeddings=True)
    return Change(
        "engine.host_embeddings=true", "rows of the embeddings come from the host", replace(config, engine=engine)
    )


def _tile(config: TrialConfig) -> Change | None:
    is_recalculated = config.gradient_checkpointing in (Checkpointing.full, Checkpointing.offloaded)
    is_long = config.batch_size * config.seq_len > _TILE_TOKENS
    if (
        config.engine.kind is EngineKind.liger
        or config.engine.mlp_tile is not None
        or not (is_recalculated and is_long)
    ):
        return None
    engine = replace(config.engine, mlp_tile=_TILE_TOKENS)
    override = f"engine.mlp_tile={_TILE_TOKENS}"
    return Change(override, "the MLP of long rows in parts", replace(config, engine=engine))


def _host_layers(config: TrialConfig) -> Change | None:
    if config.engine.host_layers == ALL or config.method.quantization is Quantization.none:
        return None
    return Change(_ALL_LAYERS, "weights of layers come from the host in each pass", _hosting(config, ALL))


def _hosting(config: TrialConfig, layers: int | str) -> TrialConfig:
    return replace(config, engine=replace(config.engine, host_layers=layers))


def _eight_bit_state(config: TrialConfig) -> Change | None:
    if config.optimizer.optim not in _IN_FP32:
        return None
    optimizer = replace(config.optimizer, optim="adamw_bnb_8bit")
    return Change(
        "optimizer=adamw_8bit", "the optimizer's state is rounded to 8 bit", replace(config, optimizer=optimizer)
    )


def _checkpointing(mode: Checkpointing, cost: str) -> Make:
    def make(config: TrialConfig) -> Change | None:
        if config.gradient_checkpointing in (mode, Checkpointing.offloaded):
            return None
        return Change(f"gradient_checkpointing={mode.name}", cost, replace(config, gradient_checkpointing=mode))

    return make


def _accumulation(config: TrialConfig) -> Change | None:
    if config.batch_size == 1:
        return None
    rows = config.batch_size * config.grad_accum_steps
    changed = replace(config, batch_size=1, grad_accum_steps=rows)
    return Change(f"batch_size=1 grad_accum_steps={rows}", "the same rows in a step, one at a time", changed)


def _four_bit(config: TrialConfig) -> Change | None:
    if config.method.quantization is not Quantization.none or config.method.use_dora:
        return None
    if config.method.init not in (Init.kaiming, Init.gaussian, Init.eva):
        return None
    method = replace(config.method, kind=MethodKind.lora, held_in=DType.fp32, quantization=Quantization.nf4)
    method.double_quantization = True
    kept = {  # method=qlora takes the place of the option that set them
        "use_rslora=true": method.use_rslora,
        "freeze_a=true": method.freeze_a,
        f"init={method.init.name}": method.init is not Init.kaiming,
        f"b_learning_rate_ratio={method.b_learning_rate_ratio}": method.b_learning_rate_ratio is not None,
    }
    override = " ".join(["method=qlora", *(f"method.{setting}" for setting, is_set in kept.items() if is_set)])
    trains_all = config.method.kind is MethodKind.full
    what = "adapters are trained, on weights" if trains_all else "frozen weights are"
    return Change(override, f"{what} rounded to 4 bit", replace(config, method=method))


def _rank(config: TrialConfig) -> Change | None:
    rank = config.method.rank // 2
    if rank < _LEAST_RANK or config.method.kind is MethodKind.full:
        return None
    method = replace(config.method, rank=rank)
    return Change(f"method.rank={rank}", "fewer trained weights", replace(config, method=method))


_KINDS_OF_CHANGE: tuple[tuple[Make, ...], ...] = (
    (
        _chunked_loss,
        _engine(EngineKind.graph, "faster steps, after a compilation for each row length"),
        _engine(EngineKind.liger, "other kernels, from the package liger-kernel"),
        _engine(EngineKind.compile, "other kernels, after a compilation"),
    ),
    (_host_embeddings,),
    (_eight_bit_state,),
    (_accumulation,),
    (
        _checkpointing(Checkpointing.full, "each layer's forward runs twice"),
        _checkpointing(Checkpointing.offloaded, "as full, and layers' inputs go to host memory and back"),
    ),
)
"""Changes that leave alone what is learnt, but for rounding; at most one of each line is taken. In the order of what
they cost. docs/engines.md and docs/peers.md have what was measured of them."""


def _combinations() -> list[list[Make]]:
    """Return every combination of these changes: the fewest first, and among equals the one whose
    costliest change costs least."""
    order = [make for kind in _KINDS_OF_CHANGE for make in kind]
    choices = itertools.product(*((None, *kind) for kind in _KINDS_OF_CHANGE))
    found = [[make for make in choice if make is not None] for choice in choices]
    return sorted(found, key=lambda makes: (len(makes), sorted(map(order.index, makes), reverse=True)))


_SPARED = _combinations()
_FURTHER: tuple[tuple[tuple[Make, ...], ...], ...] = (
    ((), (_tile,)),
    ((_four_bit,), (_rank,), (_four_bit, _rank)),
)
"""What is added to these: tiles, which serve long rows alone, then changes of what is learnt, in the order of what they
cost. Layers in host memory, which cost time in each pass, are added to a group of which nothing is enough."""
