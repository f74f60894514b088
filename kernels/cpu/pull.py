"""`pull_` in C++; see `epi_ds.kernels.reference.pull`."""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64

import torch
from torch import Tensor

from epi_ds.kernels.cpu.call import VALUE_FORMATS, check_entries, operation, pointer, threads


def pull_(
    target: Tensor,
    weights: Tensor,
    anchor: Tensor,
    factor: float | Tensor,
    *,
    source: Tensor | None = None,
    variant: str | None = None,
    num_threads: int | None = None,
) -> None:
    """See the reference, whose bits these are, and `observe_` for the arguments.

    Raises ValueError for tensors of other dtypes or numbers of entries.
    """
    numel = target.numel()
    check_pulled(target, weights, anchor, source)
    factors = factor if isinstance(factor, Tensor) else None
    if factors is not None:
        check_entries("factor", factors, torch.float32, numel)
    operation("pull", variant)(
        c_int(VALUE_FORMATS[anchor.dtype]),
        pointer(target),
        pointer(target if source is None else source),
        pointer(weights),
        pointer(anchor),
        pointer(factors),
        c_float(0.0 if isinstance(factor, Tensor) else factor),
        c_int64(numel),
        threads(numel, num_threads),
    )


def check_pulled(target: Tensor, weights: Tensor, anchor: Tensor, source: Tensor | None) -> None:
    """Raise ValueError unless tensors have the entries that will be read or written."""
    numel = target.numel()
    check_entries("target", target, torch.float32, numel)
    check_entries("weights", weights, torch.float32, numel)
    if source is not None:
        check_entries("source", source, torch.float32, numel)
    if anchor.dtype not in VALUE_FORMATS or anchor.numel() != numel:
        raise ValueError(
            f"an anchor has {anchor.numel()} entries of {anchor.dtype}; pass {numel} of torch.float32 or torch.bfloat16"
        )
