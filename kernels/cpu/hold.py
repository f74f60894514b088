"""`hold`, `restore_`, `mask_` and `count_bits` in C++; see `epi_ds.kernels.reference.hold` and `mask_bits`."""

from __future__ import annotations

from ctypes import c_int, c_int64

import torch
from torch import Tensor

from epi_ds.kernels.cpu.call import check_entries, mask_pointer, operation, pointer, threads
from epi_ds.kernels.reference import hold as reference

# Bytes of an entry; the others are rare enough for the reference.
_SIZES = (2, 4)


def hold(
    values: Tensor, bits: Tensor, num_isolated: int, *, variant: str | None = None, num_threads: int | None = None
) -> Tensor:
    """See the reference, and `observe_` for the arguments. Raises ValueError unless so many bits are set."""
    if values.itemsize not in _SIZES:
        return reference.hold(values, bits, num_isolated)
    held = values.new_empty(num_isolated)
    _move("hold", values, bits, held, variant=variant, num_threads=num_threads)
    return held


def restore_(
    values: Tensor, bits: Tensor, held: Tensor, *, variant: str | None = None, num_threads: int | None = None
) -> None:
    """See the reference, and `observe_` for the arguments. Raises ValueError unless as many bits are set."""
    if values.itemsize not in _SIZES:
        reference.restore_(values, bits, held)
        return
    check_entries("held", held, values.dtype, held.numel())
    _move("restore", values, bits, held, variant=variant, num_threads=num_threads)


def _move(
    name: str, values: Tensor, bits: Tensor, held: Tensor, *, variant: str | None, num_threads: int | None
) -> None:
    count = torch.empty(1, dtype=torch.int64)
    operation(name, variant)(
        c_int(values.itemsize),
        pointer(values),
        mask_pointer(bits, values.numel()),
        c_int64(values.numel()),
        pointer(held),
        c_int64(held.numel()),
        pointer(count),
        threads(values.numel(), num_threads),
    )
    if int(count) != held.numel():
        raise ValueError(f"{int(count)} entries are isolated, but there is room for {held.numel()}; pass their number")


def mask_(values: Tensor, bits: Tensor, *, variant: str | None = None, num_threads: int | None = None) -> None:
    """See the reference, and `observe_` for the arguments."""
    if values.itemsize not in _SIZES:
        reference.mask_(values, bits)
        return
    operation("mask", variant)(
        c_int(values.itemsize),
        pointer(values),
        mask_pointer(bits, values.numel()),
        c_int64(values.numel()),
        threads(values.numel(), num_threads),
    )


def count_bits(bits: Tensor, *, variant: str | None = None, num_threads: int | None = None) -> int:
    """See the reference, and `observe_` for the arguments."""
    count = torch.empty(1, dtype=torch.int64)
    operation("count_bits", variant)(
        pointer(bits), c_int64(bits.numel()), pointer(count), threads(bits.numel() * 8, num_threads)
    )
    return int(count)
