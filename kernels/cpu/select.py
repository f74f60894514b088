"""`select_` in C++; see `epi_ds.kernels.reference.select`."""

from __future__ import annotations

from ctypes import c_int32, c_int64

import torch
from torch import Tensor

from epi_ds.kernels.cpu.call import mask_pointer, operation, pointer, threads


def select_(
    bits: Tensor,
    codes: Tensor,
    before: Tensor,
    *,
    threshold_code: int,
    first_entry: int,
    variant: str | None = None,
    num_threads: int | None = None,
) -> Tensor:
    """See the reference, whose bits these are, and `observe_` for the arguments."""
    counts = torch.empty(2, dtype=torch.int64)
    operation("select", variant)(
        mask_pointer(bits, first_entry + codes.numel()),
        pointer(codes),
        c_int64(codes.numel()),
        mask_pointer(before, first_entry + codes.numel()),
        c_int32(threshold_code),
        c_int64(first_entry),
        pointer(counts),
        threads(codes.numel(), num_threads),
    )
    return counts
