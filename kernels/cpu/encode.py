"""`encode_` in C++; see `epi_ds.kernels.reference.codecs`."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_uint16, c_uint32

import torch
from torch import Tensor

from epi_ds.kernels.cpu.call import STATE_FORMATS, check_entries, operation, pointer, threads
from epi_ds.kernels.reference.codecs import Stored
from epi_ds.kernels.reference.dither import phase


def encode_(
    stored: Stored, values: Tensor, *, key: int, step: int, variant: str | None = None, num_threads: int | None = None
) -> None:
    """See the reference, whose bits these are, and `observe_` for the arguments."""
    codes, scales, first_index = stored
    check_entries("values", values, torch.float32, codes.numel())
    values = values.contiguous()
    if codes.dtype is torch.float32:
        codes.copy_(values)
        return
    operation("encode", variant)(
        c_int(STATE_FORMATS[codes.dtype]),
        pointer(codes),
        pointer(scales),
        pointer(values),
        c_int64(codes.numel()),
        c_int64(first_index),
        c_uint32(key),
        c_uint16(phase(step)),
        threads(codes.numel(), num_threads),
    )
