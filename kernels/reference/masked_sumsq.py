"""The squares of a gradient, with and without its isolated entries, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from epi_ds.kernels.reference.chunks import chunks
from epi_ds.kernels.reference.mask_bits import unpack_bits


def masked_sumsq(values: Tensor, bits: Tensor, *, first_entry: int = 0) -> Tensor:
    """Return the sum of squares of all entries, and of those that are not isolated. [2] fp64, on the device.

    values       [numel] any float dtype, untouched
    bits         uint8 mask on the same device, of which entry ``first_entry`` is that of ``values[0]``

    The first sum is finite exactly if every entry is. The second one leaves isolated entries out whatever they are.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=values.device)
    for first, last in chunks(first_entry, first_entry + values.numel()):
        squares = values[first - first_entry : last - first_entry].double().square_()
        sums[0] += squares.sum()
        # Never a multiplication: NaN * 0 is NaN.
        sums[1] += squares.masked_fill_(unpack_bits(bits, first, last), 0.0).sum()
    return sums
