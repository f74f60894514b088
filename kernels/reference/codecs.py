"""How importance is stored: four formats, told apart by the dtype of their codes.

    float32   4 B      the value
    bfloat16  2 B      the upper 16 bits of the fp32 pattern
    uint16    2 B      the 16 bits below the sign, which is never set: one more bit of precision than bfloat16
    uint8     1.016 B  the square root of the value relative to the largest of its block of 256, in 255 steps

The order of values is the order of codes (within a block), zero is code zero, and what is decoded is always a finite
fp32. Rounding is stochastic but for float32: see [Note: dither] in dither.py.
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
    return _levels(codes.device)[codes.int()] * _per_entry(stored)


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
        patterns = values.view(torch.int32) + ((random >> (32 - shift)) & ((1 << shift) - 1))
        # Rounding the largest finite values up would give the pattern of infinity.
        codes.view(torch.int16).copy_(patterns.clamp_(max=_LARGEST_FINITE) >> shift)
        return
    _encode_blocks_(stored, values, random)


def _encode_blocks_(stored: Stored, values: Tensor, random: Tensor) -> None:
    padded = values.new_zeros(stored.scales.numel() * BLOCK_NUMEL)
    before = stored.first_index % BLOCK_NUMEL
    padded[before : before + values.numel()] = values
    torch.amax(padded.view(-1, BLOCK_NUMEL), dim=1, out=stored.scales)
    scales = _per_entry(stored)
    relative = torch.where(scales > 0, values / scales, 0.0)
    levels = _levels(values.device)
    below = (relative.sqrt() * 255.0).int().clamp_(max=254)
    low, high = levels[below], levels[below + 1]
    # Up with a probability linear in the value, not in its root, so that the decoded value is right on average.
    chance = (relative - low) / (high - low)
    uniform = ((random >> 8) & 0xFFFFFF).float() * 2.0**-24
    stored.codes.copy_(below + (uniform < chance))


def _per_entry(stored: Stored) -> Tensor:
    """Return the scale of every entry's block. [numel] fp32."""
    before = stored.first_index % BLOCK_NUMEL
    return stored.scales.repeat_interleave(BLOCK_NUMEL)[before : before + stored.codes.numel()]


def _levels(device: torch.device) -> Tensor:
    """Return the value of every uint8 code relative to its block's largest. [256] fp32."""
    return (torch.arange(256, dtype=torch.float64, device=device) / 255.0).square_().float()
