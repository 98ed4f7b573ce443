"""Calculate a decoder layer's MLP for a part of the tokens at a time, and keep only its input for the backward.

For long rows the tensors of the MLP's width are the largest of a layer: in its backward five of them are held, 2.1 GiB
each for 78,475 tokens of Llama-3.1-8B. An MLP maps each token by itself. So the backward can take a tile of tokens,
calculate it once more, go back through it, and add up the adapters' gradients. Only the order of that sum is new.

Autograd gets two nodes. `_Keep` saves the input. `_Tiles`, which comes after it, saves nothing, and reads the input
from `_Keep`. When torch's checkpoint calculates a layer once more, it stops as soon as it has all that was saved. Where
the MLP's input is the last of that, it stops before the tiles, and the MLP is not calculated a third time. Where
something behind the MLP saves its input, as Gemma's norm does, checkpoint goes on, and the tiles are calculated.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_lab.outcome import Unsupported
from lora_lab.worker.engines.compiled import MEANT_TO_BREAK, MOST_COMPILATIONS
from lora_lab.worker.mlps import mlps_of

_ALIGNED = 64

_ROUNDING = 0.05
"""What rounding may change, as a share of the largest number: in any format, and by any kernels."""
_PARTS = [1, 5, 26]
"""Tokens that are tried together, and in these parts."""


class _TiledMlp:
    """Mixed into an MLP's class; forward and backward run over a part of the tokens at a time."""

    tile: int
    """The most tokens of a tile."""
    calculate: Callable[[Any, Tensor], Tensor]
    """The MLP's own forward, perhaps compiled: of the module, and (1, tokens, hidden size)."""
    trained: list[Tensor]
    """What its products use that is trained: parameters, or the copies of them that an engine works with."""

    @torch.compiler.disable(reason=MEANT_TO_BREAK)  # type: ignore[untyped-decorator]
    def forward(self: Any, x: Tensor) -> Tensor:
        """Map (..., hidden size) to the same."""
        if not (torch.is_grad_enabled() and (x.requires_grad or self.trained)):
            own: Callable[[Tensor], Tensor] = super().forward  # type: ignore[misc]
            return _over_tiles(own, x, self.tile) if x[..., 0].numel() > self.tile else own(x)
        if not x.requires_grad:  # `_Keep` would have no node
            x = x.detach().requires_grad_()
        found: Tensor = _Tiles.apply(_Keep.apply(x), self, *self.trained)
        return found


class _Keep(torch.autograd.Function):
    """Saves its input, and hands it on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ARG004
        return grads[0]


class _Tiles(torch.autograd.Function):
    """Runs the tiles. Its own backward calculates each once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: Any, *trained: Tensor) -> Tensor:  # noqa: ARG004
        kind = x.device.type
        ctx.kept, ctx.mlp = x.grad_fn, mlp
        # no cache: it would hold copies of the adapters beyond a tile's backward
        ctx.autocast = functools.partial(
            torch.autocast, kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
        )

        def forward(tile: Tensor) -> Tensor:
            # with a gradient, so that a tile is the same products, and the same compiled code, as in the backward
            return _calculated(mlp, tile, ctx.autocast)[1].detach()

        # not the hooks of a checkpoint around the layer: what a tile saves here ends with it
        with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            return _over_tiles(forward, x, mlp.tile)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.kept.saved_tensors
        trained = ctx.mlp.trained
        # in fp32: 20 tiles' gradients, each added in bf16, would round 20 times
        sums = [torch.zeros_like(each, dtype=torch.float32) for each in trained]

        def backward(tile: Tensor, grad_output: Tensor) -> Tensor:
            given, output = _calculated(ctx.mlp, tile, ctx.autocast)
            grad_x, *found = torch.autograd.grad(output, [given, *trained], grad_output)
            if found:
                torch._foreach_add_(sums, [grad.float() for grad in found])
            return grad_x

        grad_x = _over_tiles(backward, x, ctx.mlp.tile, grads[0])
        return grad_x, None, *(total.to(each.dtype) for total, each in zip(sums, trained, strict=True))


def _calculated(mlp: Any, tile: Tensor, autocast: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """Return the tile as a leaf, and the MLP's output of it."""
    leaf = tile.detach().requires_grad_()
    # again, since torch 2.13 keeps such settings by thread, and the backward runs in one of its own
    limits = torch._dynamo.config.patch(recompile_limit=MOST_COMPILATIONS, fail_on_recompile_limit_hit=True)
    with torch.enable_grad(), autocast(), limits:
        return leaf, mlp.calculate(mlp, leaf)


def _as_it_is(saved: Tensor) -> Tensor:
    return saved


def _over_tiles(run: Callable[..., Tensor], x: Tensor, tile: int, *more: Tensor) -> Tensor:
    """Run over tiles of tensors (..., any) with the same tokens.

    Args:
        run: takes a tile of each, (1, tokens, any), and returns (1, tokens, any).
        tile: the most tokens of a tile.

    Returns: (..., any).
    """
    given = [each.reshape(-1, each.shape[-1]) for each in (x, *more)]
    tokens = len(given[0])
    size = tile_tokens(tokens, tile)
    whole: Any = None
    for start in range(0, tokens, size):
        rows = slice(start, min(start + size, tokens))
        found = run(*(_tile(each[rows], size) for each in given))
        if size == tokens:
            whole = found
            break
        if whole is None:
            whole = found.new_empty(tokens, found.shape[-1])
        whole[rows] = found[0, : rows.stop - start]
        del found  # before the next is calculated
    result: Tensor = whole.view(*x.shape[:-1], whole.shape[-1])
    return result


def _tile(rows: Tensor, size: int) -> Tensor:
    """Return (1, size, any), filled up with zeros: each number of tokens would be one more compilation."""
    missing = size - len(rows)
    return (torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows).unsqueeze(0)


def tile_tokens(tokens: int, tile: int) -> int:
    """Return the tokens of a tile: as few tiles as there must be, of one size, a multiple of 64 where there is room."""
    tiles = -(-tokens // tile)
    if tiles == 1:
        return tokens
    even = -(-tokens // tiles)
    aligned = -(-even // _ALIGNED) * _ALIGNED
    return aligned if aligned <= tile else even


def tile_mlps(
    model: Any, tile: int, compiled: bool, copies: Mapping[Tensor, Tensor], autocast: Callable[[], Any]
) -> None:
    """Let every decoder layer calculate its MLP in tiles. Call it before the layers are compiled.

    Args:
        model: one that `check_mlps` lets pass.
        tile: the most tokens of a tile.
        compiled: whether a tile is compiled, once for all layers of a class.
        copies: what the products use instead of some trained parameters.
        autocast: makes the context in which the model trains.

    Raises: Unsupported for an MLP that does not map each token by itself.
    """
    kinds: dict[type, type] = {}
    for mlp in mlps_of(model):
        if type(mlp) not in kinds:
            if not _is_by_token(mlp, model.config.get_text_config().hidden_size, autocast):
                raise Unsupported(
                    f"engine.mlp_tile={tile}: {type(mlp).__name__} does not map each token by itself. "
                    "Use engine.mlp_tile=null."
                )
            kinds[type(mlp)] = _tiled_class(type(mlp), compiled)
        mlp.tile = tile
        mlp.trained = [copies.get(each, each) for each in mlp.parameters() if each.requires_grad]
        mlp.__class__ = kinds[type(mlp)]


def _tiled_class(kind: Any, compiled: bool) -> type:
    calculate = torch.compile(kind.forward, fullgraph=True, dynamic=False) if compiled else kind.forward
    return type(f"Tiled{kind.__name__}", (_TiledMlp, kind), {"calculate": staticmethod(calculate)})


def _is_by_token(mlp: Any, hidden_size: int, autocast: Callable[[], Any]) -> bool:
    """Compare what the MLP makes of some tokens with what it makes of parts of them. Rounding may differ a little."""
    device = next(mlp.parameters()).device
    count = sum(_PARTS)
    tokens = torch.sin(torch.arange(count * hidden_size, device=device)).view(1, count, hidden_size)
    was_training = mlp.training
    mlp.train()  # bitsandbytes repacks weights when it evaluates on a CPU
    try:
        with torch.no_grad(), autocast(), torch.compiler.set_stance("force_eager"):
            whole, parts = mlp(tokens), [mlp(part) for part in tokens.split(_PARTS, 1)]
    except TypeError:  # it takes more than the tokens
        return False
    finally:
        mlp.train(was_training)
    if not isinstance(whole, Tensor) or whole.shape != tokens.shape:
        return False
    apart = (whole - torch.cat(parts, 1)).abs().max()
    return bool(apart <= _ROUNDING * whole.abs().max())


def mlp_tile_of(model: Any) -> int | None:
    """Read from the live layers the most tokens of a tile; None where an MLP is not in tiles."""
    found = {_tile_of(mlp) for mlp in mlps_of(model)}
    return found.pop() if len(found) == 1 else None


def _tile_of(mlp: Any) -> int | None:
    """Return an MLP's tile; None where it is not in tiles, or has a forward other than its class's."""
    return mlp.tile if isinstance(mlp, _TiledMlp) and "forward" not in vars(mlp) else None
