"""The allocations of an MLP in tiles: one tile stands for all, because each has what the one before it gave back."""

from collections.abc import Callable
from dataclasses import replace

from lora_lab.fit.step import Sizes
from lora_lab.fit.tape import Tape

_ALIGNED = 64


def tile_of(sizes: Sizes) -> Sizes | None:
    """Return the sizes of one tile of an MLP in tiles; None where MLPs are calculated whole."""
    tile = sizes.config.engine.mlp_tile
    return None if tile is None else replace(sizes, tokens=tile_tokens(sizes.tokens, tile))


def tile_tokens(tokens: int, tile: int) -> int:
    """Return what `tile_tokens` in worker/engines/tiled_mlp.py does, which cannot be imported without torch."""
    even = -(-tokens // -(-tokens // tile))
    aligned = -(-even // _ALIGNED) * _ALIGNED
    return even if even == tokens or aligned > tile else aligned


def mlp_sums(sizes: Sizes) -> int:
    """Return the bytes in which an MLP in tiles adds up the gradients of its adapters, in fp32."""
    linears = (*sizes.shapes.gate_up, *sizes.shapes.down)
    return sum(4 * sizes.rank * (each.inputs + each.outputs) for each in linears if sizes.has_adapter(each))


def over_tiles(tape: Tape, sizes: Sizes, tile: Sizes, size: int, part: str, run: Callable[[], int]) -> int:
    """Begin what a pass over all tiles returns.

    Args:
        size: its bytes.
        part: what it belongs to.
        run: begins and returns the same of one tile.
    """
    if tile.tokens == sizes.tokens:
        return run()
    whole = tape.new(size, part)
    tape.free(run())
    return whole
