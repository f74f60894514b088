"""`pull_by_code_` in C++; see `epi_ds.kernels.reference.pull_by_code`."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int, c_int64, c_void_p

from torch import Tensor

from epi_ds.kernels.cpu.call import VALUE_FORMATS, operation, pointer, threads
from epi_ds.kernels.cpu.pull import check_pulled
from epi_ds.kernels.reference.pull_by_code import check_codes


def pull_by_code_(
    target: Tensor,
    weights: Tensor,
    anchor: Tensor,
    codes: Sequence[Tensor],
    factors: Tensor,
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
    check_codes(codes, factors, numel)
    operation("pull_by_code", variant)(
        c_int(VALUE_FORMATS[anchor.dtype]),
        pointer(target),
        pointer(target if source is None else source),
        pointer(weights),
        pointer(anchor),
        (c_void_p * len(codes))(*(pointer(each).value for each in codes)),
        pointer(factors),
        c_int(len(codes)),
        c_int64(numel),
        threads(numel, num_threads),
    )
