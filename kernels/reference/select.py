"""Which entries are isolated: those whose code reaches the threshold."""

from __future__ import annotations

import torch
from torch import Tensor

from epi_ds.kernels.reference.chunks import chunks
from epi_ds.kernels.reference.mask_bits import set_bits, unpack_bits


def select_(bits: Tensor, codes: Tensor, before: Tensor, *, threshold_code: int, first_entry: int) -> Tensor:
    """Write the mask of some neighbouring entries; return how many are isolated, and how many of these were before.

    bits            uint8 mask, mutated: the entries from ``first_entry`` on, as many as ``codes``
    codes           [numel] int32, not negative, same device, untouched
    before          uint8, the mask in force, of the same entries as ``bits``
    threshold_code  the smallest code that is isolated
    ->              [2] int64, on the device
    """
    counts = torch.zeros(2, dtype=torch.int64, device=codes.device)
    for first, last in chunks(first_entry, first_entry + codes.numel()):
        mask = codes[first - first_entry : last - first_entry] >= threshold_code
        counts += torch.stack([mask.sum(), (mask & unpack_bits(before, first, last)).sum()])
        set_bits(bits, mask, first)
    return counts
