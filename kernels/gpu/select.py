"""`select_` on a GPU; see `epi_ds.kernels.reference.select`.

Bytes per entry: 4 to read the codes, 1/8 to read the mask in force and 1/8 to write the new one; no fewer are possible.
The counts of the programs add 1/256 to that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor

from epi_ds.kernels.gpu.launch import Specialisation, kernel, launch, num_tiles

_TILE_BYTES = tl.constexpr(512)
_TILE_NUMEL = tl.constexpr(512 * 8)


def select_(bits: Tensor, codes: Tensor, before: Tensor, *, threshold_code: int, first_entry: int) -> Tensor:
    """See the reference, whose bits and integers these are. Calls that share a byte of the mask must not overlap."""
    numel = codes.numel()
    first_byte, last_byte = first_entry // 8, -(-(first_entry + numel) // 8)
    num_programs = num_tiles(last_byte - first_byte, _TILE_BYTES) if numel else 0
    counts = torch.empty((num_programs, 2), dtype=torch.int32, device=codes.device)
    launch(
        _select,
        num_programs,
        bits,
        codes,
        before,
        counts,
        threshold_code,
        first_entry,
        numel,
    )
    return counts.sum(dim=0)


@kernel
def _select(bits, codes, before, counts, threshold_code: tl.int32, first_entry: tl.int64, numel: tl.int64):
    program = tl.program_id(0).to(tl.int64)
    # Whole bytes belong to one program, so no two write to the same.
    first_byte = first_entry // 8 + program * _TILE_BYTES
    first = first_byte * 8 - first_entry
    byte = tl.arange(0, _TILE_BYTES)
    bit = tl.arange(0, 8)[None, :]
    entry = byte[:, None] * 8 + bit
    begin = tl.maximum(-first, 0).to(tl.int32)
    end = tl.minimum(numel - first, _TILE_NUMEL).to(tl.int32)
    covered = (entry >= begin) & (entry < end)
    chosen = covered & (tl.load(codes + first + entry, mask=covered, other=0) >= threshold_code)

    # Neighbours that share the first or the last byte keep their entries.
    touched = (byte * 8 + 8 > begin) & (byte * 8 < end)
    shared = touched & ((byte * 8 < begin) | (byte * 8 + 8 > end))
    old = tl.load(bits + first_byte + byte, mask=shared, other=0).to(tl.int32)
    kept = ~covered & (((old[:, None] >> bit) & 1) != 0)
    # At most one of the eight addends has each bit, so a sum is an OR.
    new = tl.sum((chosen | kept).to(tl.int32) << bit, axis=1)
    tl.store(bits + first_byte + byte, new.to(tl.uint8), mask=touched)

    in_force = tl.load(before + first_byte + byte, mask=touched, other=0).to(tl.int32)
    again = chosen & (((in_force[:, None] >> bit) & 1) != 0)
    tl.store(counts + 2 * program, tl.sum(chosen.to(tl.int32)))
    tl.store(counts + 2 * program + 1, tl.sum(again.to(tl.int32)))


def specialisations() -> Iterator[Specialisation]:
    """Yield all that `select_` may launch."""
    pointers = {"bits": "u8", "codes": "i32", "before": "u8", "counts": "i32"}
    yield Specialisation(_select, "i32", pointers, {})
