"""`pull_by_code_` on a GPU; see `epi_ds.kernels.reference.pull_by_code`.

Bytes per entry: 2 to read a code, beside those of `pull_`; no fewer are possible. The strongest factor of several codes
is kept in memory of its own, 8 bytes more for each of them: callers pull a chunk at a time, which stays in the second
cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton.language as tl
from torch import Tensor

from epi_ds.kernels.gpu.codecs import plain
from epi_ds.kernels.gpu.launch import Specialisation, kernel, launch, num_tiles
from epi_ds.kernels.gpu.pull import ANCHORS, check_pulled, pull_
from epi_ds.kernels.reference.pull_by_code import check_codes

_TILE_NUMEL = tl.constexpr(4096)


def pull_by_code_(
    target: Tensor,
    weights: Tensor,
    anchor: Tensor,
    codes: Sequence[Tensor],
    factors: Tensor,
    *,
    source: Tensor | None = None,
) -> None:
    """See the reference, whose bits these are. Raises ValueError for tensors of other dtypes or numbers of entries."""
    numel = target.numel()
    check_pulled(target, weights, anchor, source=source)
    check_codes(codes, factors, numel)
    tiles = num_tiles(numel, _TILE_NUMEL)
    if len(codes) == 1:
        begins = target if source is None else source
        launch(_pull_by_code, tiles, target, begins, weights, anchor, plain(codes[0]), factors, numel)
        return
    strongest, before = torch.empty_like(target), None
    for own, of_codes in zip(codes, factors, strict=True):
        launch(_look_up, tiles, strongest, before, plain(own), of_codes, numel)
        before = strongest
    pull_(target, weights, anchor, strongest, source=source)


@kernel
def _pull_by_code(target, source, weights, anchor, codes, factors, numel: tl.int64):
    first = tl.program_id(0).to(tl.int64) * _TILE_NUMEL
    entry = tl.arange(0, _TILE_NUMEL)
    inside = entry < tl.minimum(numel - first, _TILE_NUMEL).to(tl.int32)
    code = tl.load(codes + first + entry, mask=inside, other=0).to(tl.int32) & 0xFFFF
    moved = tl.load(weights + first + entry, mask=inside, other=0.0)
    moved -= tl.load(anchor + first + entry, mask=inside, other=0.0).to(tl.float32)
    moved *= tl.load(factors + code, mask=inside, other=0.0)
    tl.store(target + first + entry, tl.load(source + first + entry, mask=inside, other=0.0) + moved, mask=inside)


@kernel
def _look_up(strongest, before, codes, factors, numel: tl.int64):
    first = tl.program_id(0).to(tl.int64) * _TILE_NUMEL
    entry = tl.arange(0, _TILE_NUMEL)
    inside = entry < tl.minimum(numel - first, _TILE_NUMEL).to(tl.int32)
    code = tl.load(codes + first + entry, mask=inside, other=0).to(tl.int32) & 0xFFFF
    factor = tl.load(factors + code, mask=inside, other=0.0)
    if before is not None:
        other = tl.load(before + first + entry, mask=inside, other=0.0)
        factor = tl.where(tl.abs(factor) > tl.abs(other), factor, other)
    tl.store(strongest + first + entry, factor, mask=inside)


def specialisations() -> Iterator[Specialisation]:
    """Yield all that `pull_by_code_` may launch, beside what `pull_` may."""
    for anchor in ANCHORS.values():
        pointers = {
            "target": "fp32",
            "source": "fp32",
            "weights": "fp32",
            "anchor": anchor,
            "codes": "i16",
            "factors": "fp32",
        }
        yield Specialisation(_pull_by_code, anchor, pointers, {})
    pointers = {"strongest": "fp32", "codes": "i16", "factors": "fp32"}
    yield Specialisation(_look_up, "the first", pointers, {"before": None})
    yield Specialisation(_look_up, "a further one", {**pointers, "before": "fp32"}, {})
