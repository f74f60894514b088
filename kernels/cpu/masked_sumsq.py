"""`masked_sumsq` in C++; see `epi_ds.kernels.reference.masked_sumsq`."""

from __future__ import annotations

from ctypes import c_int, c_int64

import torch
from torch import Tensor

from epi_ds.kernels.cpu.call import VALUE_FORMATS, mask_pointer, operation, pointer, threads


def masked_sumsq(
    values: Tensor, bits: Tensor, *, first_entry: int, variant: str | None = None, num_threads: int | None = None
) -> Tensor:
    """See the reference, and `observe_` for the arguments: the same bits for any of them, summed in another order."""
    values = (values if values.dtype in VALUE_FORMATS else values.float()).contiguous()
    sums = torch.empty(2, dtype=torch.float64)
    operation("masked_sumsq", variant)(
        c_int(VALUE_FORMATS[values.dtype]),
        pointer(values),
        c_int64(values.numel()),
        mask_pointer(bits, first_entry + values.numel()),
        c_int64(first_entry),
        pointer(sums),
        threads(values.numel(), num_threads),
    )
    return sums
