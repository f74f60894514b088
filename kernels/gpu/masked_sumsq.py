"""`masked_sumsq` on a GPU; see `epi_ds.kernels.reference.masked_sumsq`.

Bytes per entry: 4 (fp32) or 2 (bf16, fp16) to read the values and 1/8 for the mask; no fewer are possible. The sums of
the programs add 1/128 to that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor

from epi_ds.kernels.gpu.launch import Specialisation, kernel, launch, num_tiles
from epi_ds.kernels.gpu.mask_bits import isolated

_TILE_NUMEL = tl.constexpr(4096)


def masked_sumsq(values: Tensor, bits: Tensor, *, first_entry: int = 0) -> Tensor:
    """See the reference. The same fp64 numbers, added in another order, which is the same every time."""
    numel = values.numel()
    num_programs = num_tiles(numel, _TILE_NUMEL)
    sums = torch.empty((num_programs, 2), dtype=torch.float64, device=values.device)
    launch(_sum_squares, num_programs, values, bits, sums, first_entry, numel)
    return sums.sum(dim=0)


@kernel
def _sum_squares(values, bits, sums, first_entry: tl.int64, numel: tl.int64):
    program = tl.program_id(0).to(tl.int64)
    first = program * _TILE_NUMEL
    entry = tl.arange(0, _TILE_NUMEL)
    covered = entry < tl.minimum(numel - first, _TILE_NUMEL).to(tl.int32)
    value = tl.load(values + first + entry, mask=covered, other=0.0).to(tl.float64)
    square = value * value
    # Never a multiplication: NaN * 0 is NaN.
    free = tl.where(isolated(bits, first_entry + first, entry, covered), 0.0, square)
    tl.store(sums + 2 * program, tl.sum(square))
    tl.store(sums + 2 * program + 1, tl.sum(free))


def specialisations() -> Iterator[Specialisation]:
    """Yield all that `masked_sumsq` may launch."""
    for entries in ("fp32", "bf16", "fp16", "fp64"):
        pointers = {"values": entries, "bits": "u8", "sums": "fp64"}
        yield Specialisation(_sum_squares, entries, pointers, {})
