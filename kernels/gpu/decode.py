"""`decode` on a GPU; see `epi_ds.kernels.reference.codecs`.

Bytes per entry: 4 to write, and 2 (bf16, u16) or 1.016 (u8) to read; no fewer are possible. Values of fp32 are the
storage itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor

from epi_ds.kernels.gpu.codecs import FORMATS, coded_specialisations, first_scale, load_tile, num_tiles, plain, tile_of
from epi_ds.kernels.gpu.launch import Specialisation, kernel, launch
from epi_ds.kernels.reference.codecs import Stored


def decode(stored: Stored) -> Tensor:
    """See the reference, whose bits these are."""
    codes, scales, first_index = stored
    if codes.dtype is torch.float32:
        return codes
    values = torch.empty(codes.numel(), dtype=torch.float32, device=codes.device)
    launch(
        _decode,
        num_tiles(stored),
        plain(codes),
        scales if codes.dtype is torch.uint8 else None,
        values,
        first_index,
        codes.numel(),
        FORMAT=FORMATS[codes.dtype],
    )
    return values


@kernel
def _decode(codes, scales, values, first_index: tl.int64, numel: tl.int64, FORMAT: tl.constexpr):  # noqa: N803
    first, entry, covered, block, touched = tile_of(first_index, numel, tl.program_id(0))
    before = first - first_index
    if FORMAT == "u8":
        scales += first_scale(first_index, first)
    found = load_tile(codes + before, scales, entry, covered, block, touched, FORMAT)
    tl.store(values + before + entry, found, mask=covered)


def specialisations() -> Iterator[Specialisation]:
    """Return all that `decode` may launch."""
    return coded_specialisations(_decode)
