"""Calling the compiled operations on tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from epi_ds.kernels.cpu.build import library

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
    """Return the address of a tensor's entries, null where there are none.

    Raises ValueError for a tensor that is not in one piece, or not in the host's memory.
    """
    if tensor is None or not tensor.numel():
        return ctypes.c_void_p(None)
    if tensor.device.type != "cpu":
        raise ValueError(f"a tensor on {tensor.device} cannot be read by a CPU operation; move it to the CPU")
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} and stride {tensor.stride()} is not in one piece")
    return ctypes.c_void_p(tensor.data_ptr())


def mask_pointer(bits: Tensor, num_entries: int) -> ctypes.c_void_p:
    """Return the address of a mask. Raises ValueError for one of fewer entries: what follows it is other memory."""
    if bits.dtype is not torch.uint8 or bits.numel() * 8 < num_entries:
        raise ValueError(
            f"a mask of {bits.numel()} entries of {bits.dtype} has no bit for each of {num_entries}; pass "
            f"{-(-num_entries // 8)} bytes of torch.uint8"
        )
    return pointer(bits)


def check_entries(name: str, tensor: Tensor, dtype: torch.dtype, numel: int) -> None:
    """Raise ValueError unless a tensor has the entries that will be read or written: beside them is other memory."""
    if tensor.dtype is not dtype or tensor.numel() != numel:
        raise ValueError(f"{name} has {tensor.numel()} entries of {tensor.dtype}; pass {numel} of {dtype}")


def threads(numel: int, asked: int | None) -> ctypes.c_int:
    """Return how many threads to use: as many as asked for, by default torch's own, but none for a handful."""
    return ctypes.c_int(asked or min(torch.get_num_threads(), -(-numel // _NUMEL_PER_THREAD) or 1))
