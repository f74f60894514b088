"""`code_histogram_` in C++; see `epi_ds.kernels.reference.code_histogram`."""

from __future__ import annotations

from ctypes import c_int64

import torch
from torch import Tensor

from epi_ds.kernels.cpu.call import operation, pointer, threads
from epi_ds.kernels.reference.code_histogram import NUM_CODES


def code_histogram_(
    bins: Tensor, codes: Tensor, *, variant: str | None = None, num_threads: int | None = None
) -> Tensor:
    """See the reference, and `observe_` for the arguments."""
    extremes = torch.tensor([NUM_CODES, -1])
    if codes.numel():
        operation("code_histogram", variant)(
            pointer(bins),
            pointer(codes),
            c_int64(codes.numel()),
            pointer(extremes),
            threads(codes.numel(), num_threads),
        )
    return extremes
