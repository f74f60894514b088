"""The values of stored importance; see codecs.py."""

from __future__ import annotations

import torch
from torch import Tensor

from epi_ds.kernels.reference.codecs import PATTERN_SHIFT, Stored, largest_square, per_entry


def decode(stored: Stored) -> Tensor:
    """Return the values. [numel] fp32; of float32 codes the storage itself, otherwise new."""
    codes = stored.codes
    if codes.dtype is torch.float32:
        return codes
    if codes.dtype in PATTERN_SHIFT:
        patterns = (codes.view(torch.int16).to(torch.int32) & 0xFFFF) << PATTERN_SHIFT[codes.dtype]
        return patterns.view(torch.float32)
    values = codes.float().square_() * per_entry(stored, stored.scales / largest_square(stored.scales))
    return values.clamp_(max=torch.finfo(torch.float32).max)
