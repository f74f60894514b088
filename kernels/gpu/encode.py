"""`encode_` on a GPU; see `epi_ds.kernels.reference.codecs`.

Bytes per entry: 4 to read, and 2 (bf16, u16) or 1.016 (u8) to write; no fewer are possible. Values of fp32 are copied.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor

from epi_ds.kernels.gpu.codecs import FORMATS, coded_specialisations, first_scale, num_tiles, plain, store_tile, tile_of
from epi_ds.kernels.gpu.dither import dither
from epi_ds.kernels.gpu.launch import Specialisation, kernel, launch
from epi_ds.kernels.reference.codecs import Stored
from epi_ds.kernels.reference.dither import phase


def encode_(stored: Stored, values: Tensor, *, key: int, step: int) -> None:
    """See the reference, whose bits these are."""
    codes, scales, first_index = stored
    if codes.dtype is torch.float32:
        if codes.data_ptr() != values.data_ptr():
            codes.copy_(values)
        return
    launch(
        _encode,
        num_tiles(stored),
        plain(codes),
        scales if codes.dtype is torch.uint8 else None,
        values,
        first_index,
        codes.numel(),
        key,
        phase(step),
        FORMAT=FORMATS[codes.dtype],
    )


@kernel
def _encode(
    codes,
    scales,
    values,
    first_index: tl.int64,
    numel: tl.int64,
    key: tl.uint32,
    phase: tl.int32,
    FORMAT: tl.constexpr,  # noqa: N803
):
    first, entry, covered, block, touched = tile_of(first_index, numel, tl.program_id(0))
    before = first - first_index
    if FORMAT == "u8":
        scales += first_scale(first_index, first)
    new = tl.load(values + before + entry, mask=covered, other=0.0)
    random = dither(first, entry, key, phase)
    store_tile(codes + before, scales, new, random, entry, covered, block, touched, FORMAT)


def specialisations() -> Iterator[Specialisation]:
    """Return all that `encode_` may launch."""
    return coded_specialisations(_encode)
