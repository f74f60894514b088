"""The random numbers of stochastic rounding; see [Note: dither] in `epi_ds.kernels.reference.dither`.

They are computed where they are needed: no byte is moved for them.
"""

from __future__ import annotations

import triton
import triton.language as tl

_GOLDEN = tl.constexpr(0x9E3779B9)


@triton.jit
def dither(first, entry, key, phase):
    """Return 16 uniform bits per entry, as int32.

    first  even index in the parameter of entry 0, int64; from there to the last entry lies no multiple of 2^33
    entry  int32, counted from ``first``
    key    of the parameter, of which the 32 low bits count
    phase  `epi_ds.kernels.reference.dither.phase` of the step
    """
    pair = first >> 1
    # The upper half of the index matters from 2^33 entries on. It is the same for all of a tile.
    start = pair.to(tl.uint32) * _GOLDEN + (pair >> 32).to(tl.uint32) + key.to(tl.uint32)
    mixed = start + (entry >> 1).to(tl.uint32) * _GOLDEN
    mixed = (mixed ^ (mixed >> 16)) * 0x85EBCA6B
    mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE35
    mixed = mixed ^ (mixed >> 16)
    # Both halves advance by themselves: no carry from the one into the other.
    half = mixed >> ((entry & 1) * 16).to(tl.uint32)
    return (half.to(tl.int32) + phase) & 0xFFFF
