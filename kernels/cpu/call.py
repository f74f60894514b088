"""Calling the compiled operations on tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from epi_ds.kernels.cpu.build import library
from torch import Tensor

STATE_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.uint16: 2, torch.uint8: 3}
VALUE_FORMATS = {torch.float32: 1, torch.bfloat16: 2}

# Entries that are worth a thread of their own.
_NUMEL_PER_THREAD = 1 << 15


def operation(name: str, variant: str | None) -> Callable[..., Any]:
    """Return an operation for an instruction set, by default the best that the machine has.

    Raises RuntimeError where the operations cannot be compiled.
    """
    operations = library()
    found: Callable[..., Any] = getattr(operations, f"epi_{name}_{variant or operations.epi_isa().decode()}")
    return found


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Return the address of a tensor's entries, null where there are none. Raises ValueError unless in one piece."""
    if tensor is None or not tensor.numel():
        return ctypes.c_void_p(None)
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} and stride {tensor.stride()} is not in one piece")
    return ctypes.c_void_p(tensor.data_ptr())


def threads(numel: int, asked: int | None) -> ctypes.c_int:
    """Return how many threads to use: as many as asked for, by default torch's own, but none for a handful."""
    return ctypes.c_int(asked or min(torch.get_num_threads(), -(-numel // _NUMEL_PER_THREAD) or 1))
