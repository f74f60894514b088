"""`observe_` in C++; see `epi_ds.kernels.reference.observe`."""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_uint16, c_uint32

from epi_ds.kernels.cpu.call import GRADIENT_FORMATS, STATE_FORMATS, operation, pointer, threads
from epi_ds.kernels.reference.codecs import Stored
from epi_ds.kernels.reference.dither import phase
from torch import Tensor


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
    codes, scales, first_index = stored
    if gradient is not None:
        gradient = (gradient if gradient.dtype in GRADIENT_FORMATS else gradient.float()).contiguous()
    operation("observe", variant)(
        c_int(STATE_FORMATS[codes.dtype]),
        c_int(0 if gradient is None else GRADIENT_FORMATS[gradient.dtype]),
        pointer(codes),
        pointer(scales),
        pointer(gradient),
        c_int64(codes.numel()),
        c_int64(first_index),
        c_float(ema_decay),
        c_float(1.0 - ema_decay),
        c_float(inverse_scale),
        c_uint32(key),
        c_uint16(phase(step)),
        threads(codes.numel(), num_threads),
    )
