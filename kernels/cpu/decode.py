"""`decode` in C++; see `epi_ds.kernels.reference.codecs`."""

from __future__ import annotations

from ctypes import c_int, c_int64

import torch
from torch import Tensor

from epi_ds.kernels.cpu.call import STATE_FORMATS, operation, pointer, threads
from epi_ds.kernels.reference.codecs import Stored


def decode(stored: Stored, *, variant: str | None = None, num_threads: int | None = None) -> Tensor:
    """See the reference, whose bits these are, and `observe_` for the arguments. New memory, also of float32 codes."""
    codes, scales, first_index = stored
    if codes.dtype is torch.float32:
        return codes.clone()
    values = torch.empty(codes.numel())
    operation("decode", variant)(
        c_int(STATE_FORMATS[codes.dtype]),
        pointer(codes),
        pointer(scales),
        pointer(values),
        c_int64(codes.numel()),
        c_int64(first_index),
        threads(codes.numel(), num_threads),
    )
    return values
