"""`observe_` in C++; see `epi_ds.kernels.reference.observe`."""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_uint16

import torch
from torch import Tensor

from epi_ds.kernels.cpu.call import STATE_FORMATS, VALUE_FORMATS, operation, pointer, threads
from epi_ds.kernels.reference.dither import phase
from epi_ds.kernels.reference.runs import Column


def observe_(
    codes: Tensor,
    scales: Tensor,
    gradient: Tensor | None,
    table: Tensor,
    *,
    ema_decay: float,
    inverse_scale: float,
    rescale: float,
    step: int,
    variant: str | None = None,
    num_threads: int | None = None,
) -> None:
    """See the reference, whose bits these are, for any instruction set and number of threads.

    With ``torch.set_flush_denormal(True)`` they are not: it is a setting of the calling thread, which others do not
    have.

    variant      instruction set, of `build.variants`; None is the best that the machine has
    num_threads  None is torch's own
    Raises ValueError for a gradient that cannot be rescaled in place or is shorter than its table, and RuntimeError
    where the operations cannot be compiled.
    """
    if gradient is not None and rescale != 1.0 and not (gradient.dtype is torch.float32 and gradient.is_contiguous()):
        raise ValueError(
            f"a gradient of {gradient.dtype} and stride {gradient.stride()} cannot be rescaled in place; pass "
            "contiguous float32"
        )
    if gradient is not None:
        covered = int((table[:, Column.START] + table[:, Column.NUMEL]).max()) if len(table) else 0
        if covered > gradient.numel():
            raise ValueError(f"a gradient of {gradient.numel()} entries has not the {covered} that its table covers")
        gradient = (gradient if gradient.dtype in VALUE_FORMATS else gradient.float()).contiguous()
    operation("observe", variant)(
        c_int(STATE_FORMATS[codes.dtype]),
        c_int(0 if gradient is None else VALUE_FORMATS[gradient.dtype]),
        pointer(codes),
        pointer(scales),
        pointer(gradient),
        pointer(table),
        c_int64(len(table)),
        c_float(ema_decay),
        c_float(1.0 - ema_decay),
        c_float(inverse_scale),
        c_float(rescale),
        c_uint16(phase(step)),
        threads(max(codes.numel(), 0 if gradient is None else gradient.numel()), num_threads),
    )
