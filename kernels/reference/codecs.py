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
from epi_ds.kernels.reference.dither import dither
from torch import Tensor

# Entries that share a scale: those with the same global index / 256, so that a block is the same at every partitioning
# but where a partition's border cuts it.
BLOCK_NUMEL = 256
_BLOCK_BITS = 8

# The shift from an fp32 pattern to a 16-bit code, and the code of the largest finite value.
_PATTERN_SHIFT = {torch.bfloat16: 16, torch.uint16: 15}
_LARGEST_FINITE = 0x7F7FFFFF

# Of uint8: the smallest value that the largest code may stand for, and what a square may miss.
_SMALLEST_SCALE = 2.0**-110
_TOLERANCE = 2.0**-21


class Stored(NamedTuple):
    """A run of one parameter's importance. Its tensors are the storage itself, not copies."""

    codes: Tensor
    """[numel] float32, bfloat16, uint16 or uint8"""
    scales: Tensor
    """[num_blocks] fp32, the largest value of each block; empty unless the codes are uint8"""
    first_index: int
    """Index of the first entry in the flattened parameter."""

    def piece(self, start: int, stop: int) -> Stored:
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


def decode(stored: Stored) -> Tensor:
    """Return the values. [numel] fp32; of float32 codes the storage itself, otherwise new."""
    codes = stored.codes
    if codes.dtype is torch.float32:
        return codes
    if codes.dtype in _PATTERN_SHIFT:
        patterns = (codes.view(torch.int16).to(torch.int32) & 0xFFFF) << _PATTERN_SHIFT[codes.dtype]
        return patterns.view(torch.float32)
    values = codes.float().square_() * _per_entry(stored, stored.scales / _largest_square(stored.scales))
    return values.clamp_(max=torch.finfo(torch.float32).max)


def encode_(stored: Stored, values: Tensor, *, key: int, step: int) -> None:
    """Overwrite a run with values, in place.

    stored  mutated; a uint8 run must begin and end at borders of blocks, or where its storage does
    values  [numel] fp32, finite, not negative
    key     of the parameter, 32 bits; with ``step`` the source of the rounding
    """
    codes = stored.codes
    if codes.dtype is torch.float32:
        if codes.data_ptr() != values.data_ptr():
            codes.copy_(values)
        return
    random = dither(key, stored.first_index, codes.numel(), step=step, device=codes.device)
    if codes.dtype in _PATTERN_SHIFT:
        shift = _PATTERN_SHIFT[codes.dtype]
        patterns = values.view(torch.int32) + (random >> (16 - shift))
        # Rounding the largest finite values up would give the pattern of infinity.
        codes.view(torch.int16).copy_(patterns.clamp_(max=_LARGEST_FINITE) >> shift)
        return
    _encode_blocks_(stored, values, random)


def _encode_blocks_(stored: Stored, values: Tensor, random: Tensor) -> None:
    padded = values.new_zeros(stored.scales.numel() * BLOCK_NUMEL)
    before = stored.first_index % BLOCK_NUMEL
    padded[before : before + values.numel()] = values
    largest = torch.amax(padded.view(-1, BLOCK_NUMEL), dim=1, out=stored.scales)
    # Codes of a smaller block would stand for denormal numbers, which round too coarsely to decay: it becomes zero.
    largest.masked_fill_(largest < _SMALLEST_SCALE, 0.0)
    inverse = torch.where(largest > 0, _largest_square(largest) / largest, 0.0)
    # What stands for a code may miss its square by a few roundings, upwards or downwards: it must keep the code.
    square = values * _per_entry(stored, inverse * (1.0 + _TOLERANCE))
    whole = square.sqrt().floor()
    # The root may have been rounded to the next whole number, up or, by vector libraries, down.
    whole -= (whole * whole > square).float()
    whole += ((whole + 1.0).square() <= square).float()
    # Up with a probability linear in the value, not in its root, so that the decoded value is right on average.
    above = values * _per_entry(stored, inverse * (1.0 - _TOLERANCE)) - whole * whole
    stored.codes.copy_(whole + (random.float() * 2.0**-16 * (whole + whole + 1.0) < above))


def _largest_square(scales: Tensor) -> Tensor:
    """Return the square of the largest code for every block. A division by or of a number is two roundings in torch."""
    return torch.full_like(scales, 255.0**2)


def _per_entry(stored: Stored, of_blocks: Tensor) -> Tensor:
    """Return a number of every entry's block: [num_blocks] -> [numel]."""
    before = stored.first_index % BLOCK_NUMEL
    return of_blocks.repeat_interleave(BLOCK_NUMEL)[before : before + stored.codes.numel()]
