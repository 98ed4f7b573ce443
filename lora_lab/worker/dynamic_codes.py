"""Keep a number in a byte: bitsandbytes' dynamic maps, with the largest absolute value of each block as its scale.

A map has 256 numbers between -1 (or 0) and 1, closer to each other near 0. A number becomes the code of the nearest.

Which that is takes two look-ups instead of a search in eight steps. The upper 16 bits of a number give the lowest code
of all numbers that begin so. None of these intervals has more than one midpoint of two codes in it, so one comparison
says whether the code is the next one. All of it is by element, and a compiler puts it into the kernel that has the
number; torch.bucketize would be one of its own on a CPU.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
"""Elements that share a scale."""
_HALF = 1 << 16
"""The numbers that the upper 16 bits of an fp32 number can be."""


class Maps(NamedTuple):
    """Two maps, signed and unsigned, each a row."""

    numbers: Tensor
    """(2, 256) fp32: what a code means."""
    lowest: Tensor
    """(2, 65536) uint8: the lowest code of numbers with these upper 16 bits."""
    midpoints: Tensor
    """(2, 256) fp32: above it a code is the next one; infinite for the last."""


def dynamic_maps(device: torch.device) -> Maps:
    """Make bitsandbytes' maps on a device."""
    from bitsandbytes.functional import create_dynamic_map  # its import takes seconds

    rows = []
    for signed in (True, False):
        numbers = create_dynamic_map(signed=signed).cpu()
        midpoints = (numbers[1:] + numbers[:-1]) / 2
        rows.append((numbers, _lowest(midpoints), torch.nn.functional.pad(midpoints, (0, 1), value=torch.inf)))
    return Maps(*(torch.stack(each).to(device) for each in zip(*rows, strict=True)))


def _lowest(midpoints: Tensor) -> Tensor:
    """Return for each 16 bits the code of the lowest number that begins with them; of what is no number, any."""
    upper = torch.arange(_HALF, dtype=torch.int64)
    upper = torch.where(upper < _HALF // 2, upper, upper - _HALF) << 16
    ends = torch.stack([upper, upper + _HALF - 1]).to(torch.int32).view(torch.float32)
    return torch.bucketize(ends.amin(0).nan_to_num(), midpoints).to(torch.uint8)


def decoded(codes: Tensor, scales: Tensor, numbers: Tensor) -> Tensor:
    """Return the numbers of codes, in fp32.

    Args:
        codes: (blocks, 256) uint8.
        scales: (blocks,) fp32.
        numbers: (256,) fp32, a row of the maps.
    """
    return numbers[codes.int()] * scales[:, None]


def encode_into(codes: Tensor, scales: Tensor, exact: Tensor, lowest: Tensor, midpoints: Tensor) -> None:
    """Replace codes and scales by those of `exact`, (blocks, 256) in fp32; the rest are rows of the maps."""
    largest = exact.abs().amax(1)
    parts = exact / torch.where(largest > 0, largest, 1.0)[:, None]
    found = lowest[(parts.view(torch.int32) >> 16) & (_HALF - 1)].int()
    codes.copy_(found + (parts > midpoints[found]))
    scales.copy_(largest)
