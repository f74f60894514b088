"""How importance is stored, a tile at a time; see `epi_ds.kernels.reference.codecs`, which gives the same bits.

A tile is [8, 16, 32]: 32 neighbours are entries of one warp, 8 times these are a block, and 16 blocks are a tile. The
order of the dimensions is what makes Triton give each block to one warp as a whole: its largest is found without shared
memory, and its scale is not divided again by every warp. Entries of a tile that are not part of the run are masked.
They decode to zero, which changes nothing, not even the largest of a block.

Bytes per entry: 2 * 4 (fp32), 2 * 2 (bf16, u16) or 2 * 1.016 (u8) to update, and no fewer are possible; half of that to
only read or only write.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from epi_ds.kernels.gpu.launch import Specialisation
from epi_ds.kernels.reference import codecs, runs
from epi_ds.kernels.reference.codecs import Stored

TILE_NUMEL = tl.constexpr(runs.TILE_NUMEL)
BLOCK_NUMEL = tl.constexpr(codecs.BLOCK_NUMEL)
TILE_BLOCKS = tl.constexpr(runs.TILE_NUMEL // codecs.BLOCK_NUMEL)
LANES = tl.constexpr(32)
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)

_LARGEST_PATTERN = tl.constexpr(0x7F7FFFFF)
_LARGEST_SQUARE = tl.constexpr(255.0**2)
_SMALLEST_SCALE = tl.constexpr(2.0**-110)
_ABOVE_ONE = tl.constexpr(1.0 + 2.0**-21)
_BELOW_ONE = tl.constexpr(1.0 - 2.0**-21)

FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint16: "u16", torch.uint8: "u8"}
"""What kernels call the formats."""

ENTRIES = {"fp32": "fp32", "bf16": "i16", "u16": "i16", "u8": "u8"}
"""The entries of the codes as kernels see them."""


def plain(codes: Tensor) -> Tensor:
    """Return codes as kernels see them: what takes the upper 16 bits of a pattern is a number of 16 bits."""
    return codes.view(torch.int16) if codes.element_size() == 2 else codes


def num_tiles(stored: Stored) -> int:
    """Return how many tiles a run touches."""
    numel, first_index = stored.codes.numel(), stored.first_index
    return runs.Run(start=0, numel=numel, first_code=0, first_block=0, first_index=first_index, key=0).num_tiles


@triton.jit
def tile_of(first_index, numel, tile):
    """Return where a run and one of its tiles meet.

    first_index  of the run in the parameter, int64
    numel        of the run, int64
    tile         counted from the run's first one
    ->           index in the parameter of the tile's first entry, int64; the entries [8, 16, 32] and the blocks [16],
                 both int32 and counted from there; and which of each are the run's
    """
    # Triton's interpreter takes a small number for an int32, however it is annotated.
    first = (first_index.to(tl.int64) // TILE_NUMEL + tile) * TILE_NUMEL
    block = tl.arange(0, TILE_BLOCKS)
    part = tl.arange(0, BLOCK_NUMEL // LANES)[:, None, None]
    entry = part * LANES + block[None, :, None] * BLOCK_NUMEL + tl.arange(0, LANES)[None, None, :]
    begin = tl.maximum(first_index - first, 0).to(tl.int32)
    end = tl.minimum(first_index + numel - first, TILE_NUMEL).to(tl.int32)
    covered = (entry >= begin) & (entry < end)
    touched = (block * BLOCK_NUMEL + BLOCK_NUMEL > begin) & (block * BLOCK_NUMEL < end)
    return first, entry, covered, block, touched


@triton.jit
def first_scale(first_index, first):
    """Return how many scales of a run come before those of the tile that begins at ``first``; -1 is the least."""
    return first // BLOCK_NUMEL - first_index // BLOCK_NUMEL


@triton.jit
def load_tile(codes, scales, entry, covered, block, touched, FORMAT: tl.constexpr):  # noqa: N803
    """Return the values of a tile. [8, 16, 32] fp32

    codes   of the tile's first entry, a pointer
    scales  of the tile's first block, a pointer
    """
    code = tl.load(codes + entry, mask=covered, other=0)
    if FORMAT == "fp32":
        values = code
    elif FORMAT == "bf16":
        values = ((code.to(tl.int32) & 0xFFFF) << 16).to(tl.float32, bitcast=True)
    elif FORMAT == "u16":
        values = ((code.to(tl.int32) & 0xFFFF) << 15).to(tl.float32, bitcast=True)
    else:
        unit = tl.div_rn(tl.load(scales + block, mask=touched, other=0.0), _LARGEST_SQUARE)
        root = code.to(tl.float32)
        values = tl.minimum(root * root * unit[None, :, None], LARGEST)
    return values


@triton.jit
def store_tile(codes, scales, values, random, entry, covered, block, touched, FORMAT: tl.constexpr):  # noqa: N803
    """Overwrite a tile with values, which must be zero where the tile is not covered.

    random  of `dither`; unused by fp32
    """
    if FORMAT == "fp32":
        code = values
    elif FORMAT == "bf16":
        code = _upper_16(values, random, 16)
    elif FORMAT == "u16":
        code = _upper_16(values, random, 15)
    else:
        largest = tl.max(tl.max(values, axis=0), axis=1)
        # Codes of a smaller block would stand for denormal numbers, which round too coarsely to decay.
        largest = tl.where(largest < _SMALLEST_SCALE, 0.0, largest)
        code = _root_codes(values, largest, random)
        tl.store(scales + block, largest, mask=touched)
    tl.store(codes + entry, code, mask=covered)


@triton.jit
def _upper_16(values, random, SHIFT: tl.constexpr):  # noqa: N803
    raised = values.to(tl.int32, bitcast=True) + (random >> (16 - SHIFT))
    # Rounding the largest finite values up would give the pattern of infinity.
    return (tl.minimum(raised, _LARGEST_PATTERN) >> SHIFT).to(tl.int16)


@triton.jit
def _root_codes(values, largest, random):
    inverse = tl.where(largest > 0, tl.div_rn(_LARGEST_SQUARE, largest), 0.0)
    square = values * (inverse * _ABOVE_ONE)[None, :, None]
    # The whole part of the correctly rounded root. An exact one takes a subroutine, which spills registers. Any root is
    # good enough to start from, also the approximate one of the processor: made smaller by more than it may be off, and
    # by less than one, it can only be one whole number too small.
    whole = tl.floor(tl.sqrt(square) * (1.0 - 2.0**-11))
    next_whole = whole + 1.0
    # Numbers right below the square of m * 2^k have roots that are rounded up to it where m is between 1 and sqrt(2).
    fraction = next_whole.to(tl.int32, bitcast=True) & 0x7FFFFF
    rounds_up = (fraction > 0) & (fraction < 0x3504F3)
    least = (next_whole * next_whole).to(tl.int32, bitcast=True) - rounds_up.to(tl.int32)
    whole = tl.where(square.to(tl.int32, bitcast=True) >= least, next_whole, whole)
    # Up with a probability linear in the value, not in its root, so that the decoded value is right on average.
    above = values * (inverse * _BELOW_ONE)[None, :, None] - whole * whole
    up = random.to(tl.float32) * 2.0**-16 * (whole + whole + 1.0) < above
    return tl.where(up, whole + 1.0, whole).to(tl.int32).to(tl.uint8)


def coded_specialisations(function: Any) -> Iterator[Specialisation]:
    """Yield all that a kernel between coded importance and fp32 values may be launched for."""
    for form in ("bf16", "u16"):
        pointers = {"codes": ENTRIES[form], "values": "fp32"}
        yield Specialisation(function, form, pointers, {"scales": None, "FORMAT": form})
    pointers = {"codes": "u8", "scales": "fp32", "values": "fp32"}
    yield Specialisation(function, "u8", pointers, {"FORMAT": "u8"})
