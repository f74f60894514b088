"""`sketch_counts` in C++; see `epi_ds.kernels.reference.sketch_counts`."""

from __future__ import annotations

from ctypes import c_int64

import torch
from torch import Tensor

from epi_ds.kernels.cpu.call import operation, pointer, threads


def sketch_counts(
    codes: Tensor, edges: Tensor, *, variant: str | None = None, num_threads: int | None = None
) -> Tensor:
    """See the reference, and `observe_` for the arguments."""
    counts = torch.empty(edges.numel(), dtype=torch.int64)
    operation("sketch_counts", variant)(
        pointer(codes),
        c_int64(codes.numel()),
        pointer(edges),
        c_int64(edges.numel()),
        pointer(counts),
        threads(codes.numel(), num_threads),
    )
    return counts
