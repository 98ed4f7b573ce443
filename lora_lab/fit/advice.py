"""Say what to change so that a trial fits, the cheapest change first."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from lora_lab.config import TrialConfig
from lora_lab.fit.estimate import FITS, estimate
from lora_lab.fit.search import Search
from lora_lab.fit.shapes import Shapes
from lora_lab.options import Checkpointing, EngineKind, Quantization

_IN_FP32 = ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit")
_LEAST_RANK = 8


@dataclass(frozen=True, slots=True)
class Change:
    """A change of settings."""

    override: str
    """What to type."""
    cost: str
    config: TrialConfig

    @property
    def setting(self) -> str:
        """Return the first setting that it changes."""
        return self.override.partition("=")[0]


Make = Callable[[TrialConfig], Change | None]
"""Makes a change of a configuration; None where it has nothing to change."""


def advise(config: TrialConfig, shapes: Shapes, capacity: float) -> list[Change]:
    """Return the changes that together make a trial fit with certainty; empty where those known here do not.

    The first single change that is enough, in the order of what it costs. Where none is enough by itself, they are
    added one after the other, those that are not needed are left out again, and rows are shortened last.

    Args:
        capacity: of the card, in bytes.
    """

    def fits(changed: TrialConfig) -> bool:
        return estimate(changed, shapes).verdict(capacity) == FITS

    for make in _CHANGES:
        change = make(config)
        if change is not None and fits(change.config):
            return [change]
    taken: list[Make] = []
    need = estimate(config, shapes).high
    for make in _CHANGES:
        less = estimate(_applied(config, [*taken, make])[0], shapes).high
        if less < need:
            need, taken = less, [*taken, make]
        if need <= capacity:
            break
    now, changes = _applied(config, taken)
    if need > capacity:
        shorter = Search(now, shapes).largest("seq_len", capacity, certain=True)
        if not 0 < shorter < now.seq_len:
            return []
        return [*changes, Change(f"seq_len={shorter}", "longer rows are cut", replace(now, seq_len=shorter))]
    for make in list(taken):
        others = [other for other in taken if other is not make]
        if fits(_applied(config, others)[0]):
            taken = others
    return _applied(config, taken)[1]


def _applied(config: TrialConfig, makes: list[Make]) -> tuple[TrialConfig, list[Change]]:
    """Apply changes one after the other; of two for one setting the last stays."""
    changes: dict[str, Change] = {}
    for make in makes:
        change = make(config)
        if change is not None:
            changes.pop(change.setting, None)
            changes[change.setting] = change
            config = change.config
    return config, list(changes.values())


def _chunked_loss(config: TrialConfig) -> Change | None:
    if config.engine.chunked_loss:
        return None
    engine = replace(config.engine, chunked_loss=True)
    return Change("engine.chunked_loss=true", "the same loss, a few logits at a time", replace(config, engine=engine))


def _graph(config: TrialConfig) -> Change | None:
    if config.engine.kind is EngineKind.graph or config.method.use_dora or config.method.dropout:
        return None
    engine = replace(config.engine, kind=EngineKind.graph, chunked_loss=True)
    return Change(
        "engine=graph", "faster steps, after a compilation for each row length", replace(config, engine=engine)
    )


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
    method = replace(config.method, quantization=Quantization.nf4, double_quantization=True)
    return Change("method=qlora", "frozen weights are rounded to 4 bit", replace(config, method=method))


def _rank(config: TrialConfig) -> Change | None:
    rank = config.method.rank // 2
    if rank < _LEAST_RANK:
        return None
    method = replace(config.method, rank=rank)
    return Change(f"method.rank={rank}", "fewer trained weights", replace(config, method=method))


_CHANGES: tuple[Make, ...] = (
    _chunked_loss,
    _graph,
    _eight_bit_state,
    _accumulation,
    _checkpointing(Checkpointing.full, "each layer's forward runs twice"),
    _checkpointing(Checkpointing.offloaded, "as full, and layers' inputs go to host memory and back"),
    _four_bit,
    _rank,
)
"""In the order of what they cost, in speed and then in what is learnt. docs/engines.md and docs/peers.md have what was
measured of the first six."""
