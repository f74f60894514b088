"""`observe_` in C++; see `epi_ds.kernels.reference.observe`."""

from __future__ import annotations

import ctypes

import torch
from epi_ds.kernels.cpu.build import library
from epi_ds.kernels.reference.codecs import Stored
from epi_ds.kernels.reference.dither import phase
from torch import Tensor

_STATES = {torch.float32: 0, torch.bfloat16: 1, torch.uint16: 2, torch.uint8: 3}
_GRADIENTS = {torch.float32: 1, torch.bfloat16: 2}


def observe_(
    stored: Stored,
    gradient: Tensor | None,
    *,
    ema_decay: float,
    inverse_scale: float,
    key: int,
    step: int,
    variant: str | None = None,
    num_threads: int | None = None,
) -> None:
    """See the reference, whose bits these are, for any instruction set and number of threads.

    variant      instruction set, of `build.variants`; None is the best that the machine has
    num_threads  None is torch's own
    Raises RuntimeError where the operations cannot be compiled.
    """
    operations = library()
    codes, scales, _ = stored
    if not codes.is_contiguous():
        raise ValueError(f"codes of stride {codes.stride()} are not in one piece")
    if gradient is not None:
        gradient = gradient.contiguous() if gradient.dtype in _GRADIENTS else gradient.float().contiguous()
    operation = getattr(operations, f"epi_observe_{variant or operations.epi_isa().decode()}")
    operation(
        ctypes.c_int(_STATES[codes.dtype]),
        ctypes.c_int(0 if gradient is None else _GRADIENTS[gradient.dtype]),
        ctypes.c_void_p(codes.data_ptr()),
        ctypes.c_void_p(scales.data_ptr() if scales.numel() else None),
        ctypes.c_void_p(None if gradient is None else gradient.data_ptr()),
        ctypes.c_int64(codes.numel()),
        ctypes.c_int64(stored.first_index),
        ctypes.c_float(ema_decay),
        ctypes.c_float(1.0 - ema_decay),
        ctypes.c_float(inverse_scale),
        ctypes.c_uint32(key),
        ctypes.c_uint16(phase(step)),
        ctypes.c_int(num_threads or torch.get_num_threads()),
    )
