"""Values into the formats of importance; see codecs.py."""

from __future__ import annotations

import torch
from torch import Tensor

from epi_ds.kernels.reference.codecs import (
    BLOCK_NUMEL,
    LARGEST_FINITE,
    PATTERN_SHIFT,
    SMALLEST_SCALE,
    TOLERANCE,
    Stored,
    largest_square,
    per_entry,
)
from epi_ds.kernels.reference.dither import dither


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
    if codes.dtype in PATTERN_SHIFT:
        shift = PATTERN_SHIFT[codes.dtype]
        patterns = values.view(torch.int32) + (random >> (16 - shift))
        # Rounding the largest finite values up would give the pattern of infinity.
        codes.view(torch.int16).copy_(patterns.clamp_(max=LARGEST_FINITE) >> shift)
        return
    _encode_blocks_(stored, values, random)


def _encode_blocks_(stored: Stored, values: Tensor, random: Tensor) -> None:
    padded = values.new_zeros(stored.scales.numel() * BLOCK_NUMEL)
    before = stored.first_index % BLOCK_NUMEL
    padded[before : before + values.numel()] = values
    largest = torch.amax(padded.view(-1, BLOCK_NUMEL), dim=1, out=stored.scales)
    # Codes of a smaller block would stand for denormal numbers, which round too coarsely to decay: it becomes zero.
    largest.masked_fill_(largest < SMALLEST_SCALE, 0.0)
    inverse = torch.where(largest > 0, largest_square(largest) / largest, 0.0)
    # What stands for a code may miss its square by a few roundings, upwards or downwards: it must keep the code.
    square = values * per_entry(stored, inverse * (1.0 + TOLERANCE))
    # The fp32 root, correctly rounded: torch's own may be one unit off. Where it was rounded up to a whole number, that
    # one is the nearer code by far.
    whole = square.double().sqrt().float().floor()
    # Up with a probability linear in the value, not in its root, so that the decoded value is right on average.
    above = values * per_entry(stored, inverse * (1.0 - TOLERANCE)) - whole * whole
    stored.codes.copy_(whole + (random.float() * 2.0**-16 * (whole + whole + 1.0) < above))
