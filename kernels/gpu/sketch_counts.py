"""`sketch_counts` on a GPU; see `epi_ds.kernels.reference.sketch_counts`.

Bytes per entry: 4 to read, and no fewer are possible. What bounds the first round of a refresh is not these but the
search and one atomic addition per entry between the first and the last edge; a refined round has few of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor

from epi_ds.kernels.gpu.launch import Specialisation, kernel, launch, num_tiles

_TILE_NUMEL = tl.constexpr(4096)


def sketch_counts(codes: Tensor, edges: Tensor) -> Tensor:
    """See the reference, whose integers these are."""
    numel, num_edges = codes.numel(), edges.numel()
    bins = torch.zeros(num_edges, dtype=torch.int64, device=codes.device)
    launch(
        _count,
        num_tiles(numel, _TILE_NUMEL),
        codes,
        edges,
        bins,
        numel,
        num_edges,
        (num_edges - 1).bit_length(),
    )
    # bins[j] counts the codes that reach edge j and no later one.
    return bins.flip(0).cumsum(0).flip(0)


@kernel
def _count(codes, edges, bins, numel: tl.int64, num_edges: tl.int32, num_halvings: tl.int32):
    first = tl.program_id(0).to(tl.int64) * _TILE_NUMEL
    entry = tl.arange(0, _TILE_NUMEL)
    # Codes are not negative: what is not covered reaches no edge that any code could miss.
    covered = entry < tl.minimum(numel - first, _TILE_NUMEL).to(tl.int32)
    code = tl.load(codes + first + entry, mask=covered, other=0)
    last = num_edges - 1
    lowest = tl.load(edges)
    highest = tl.load(edges + last)

    # Too many to add them one by one to a single number.
    above = tl.sum((covered & (code >= highest)).to(tl.int32))
    tl.atomic_add(bins + last, above.to(tl.int64), sem="relaxed")

    inside = covered & (code >= lowest) & (code < highest)
    # edges[low] <= code < edges[high]
    low = tl.zeros([_TILE_NUMEL], dtype=tl.int32)
    high = low + last
    for _ in range(num_halvings):
        middle = (low + high) // 2
        reaches = tl.load(edges + middle, mask=inside, other=0) <= code
        low = tl.where(reaches, middle, low)
        high = tl.where(reaches, high, middle)
    tl.atomic_add(bins + low, tl.full([_TILE_NUMEL], 1, tl.int64), mask=inside, sem="relaxed")


def specialisations() -> Iterator[Specialisation]:
    """Yield all that `sketch_counts` may launch."""
    yield Specialisation(_count, "i32", {"codes": "i32", "edges": "i32", "bins": "i64"}, {})
