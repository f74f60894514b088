"""How importance is stored: four formats, told apart by the dtype of their codes.

    float32   4 B      the value
    bfloat16  2 B      the upper 16 bits of the fp32 pattern
    uint16    2 B      the 16 bits below the sign, which is never set: one more bit of precision than bfloat16
    uint8     1.016 B  the square root of the value relative to the largest of its block of 256, in 255 steps; a block
                       of which the largest is below 2^-110 is zeros

The order of values is the order of codes (within a block), zero is code zero, and what is decoded is always a finite
fp32. Rounding is stochastic but for float32: see [Note: dither] in dither.py. A value that a code stands for keeps that
code, whatever the random number. Other implementations give the same bits, so every operation here is one rounding of
fp32, in this order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Entries that share a scale: those with the same global index / 256, so that a block is the same at every partitioning
# but where a partition's border cuts it.
BLOCK_NUMEL = 256
_BLOCK_BITS = 8

# The shift from an fp32 pattern to a 16-bit code, and the code of the largest finite value.
PATTERN_SHIFT = {torch.bfloat16: 16, torch.uint16: 15}
LARGEST_FINITE = 0x7F7FFFFF

# Of uint8: the smallest value that the largest code may stand for, and what a square may miss.
SMALLEST_SCALE = 2.0**-110
TOLERANCE = 2.0**-21


class Stored(NamedTuple):
    """A run of one parameter's importance. Its tensors are the storage itself, not copies."""

    codes: Tensor
    """[numel] float32, bfloat16, uint16 or uint8"""
    scales: Tensor
    """[num_blocks] fp32, the largest value of each block; empty unless the codes are uint8"""
    first_index: int
    """Index of the first entry in the flattened parameter."""

    def part(self, start: int, stop: int) -> Stored:
        """Return entries ``[start, stop)`` of this run."""
        first_index = self.first_index + start
        scales = self.scales
        if scales.numel():
            first_block = self.first_index >> _BLOCK_BITS
            scales = scales[(first_index >> _BLOCK_BITS) - first_block :][: num_blocks(first_index, stop - start)]
        return Stored(self.codes[start:stop], scales, first_index)


def num_blocks(first_index: int, numel: int) -> int:
    """Return how many blocks a run of entries touches."""
    return ((first_index + numel - 1) >> _BLOCK_BITS) - (first_index >> _BLOCK_BITS) + 1 if numel else 0


def largest_square(scales: Tensor) -> Tensor:
    """Return the square of the largest code for every block. A division by or of a number is two roundings in torch."""
    return torch.full_like(scales, 255.0**2)


def per_entry(stored: Stored, of_blocks: Tensor) -> Tensor:
    """Return a number of every entry's block: [num_blocks] -> [numel]."""
    before = stored.first_index % BLOCK_NUMEL
    return of_blocks.repeat_interleave(BLOCK_NUMEL)[before : before + stored.codes.numel()]
