"""`pull_` on a GPU; see `epi_ds.kernels.reference.pull`.

Bytes per entry: 4 to read the weight, 2 (bf16) or 4 (fp32) for the anchor, and 4 to write the target; 4 more to read
the source where it is not the weight, and 4 for a factor of each. No fewer are possible in a pass of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton.language as tl
from torch import Tensor

from epi_ds.kernels.gpu.launch import Specialisation, kernel, launch, num_tiles

_TILE_NUMEL = tl.constexpr(4096)

ANCHORS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
"""What kernels call the entries of an anchor."""


def pull_(
    target: Tensor, weights: Tensor, anchor: Tensor, factor: float | Tensor, *, source: Tensor | None = None
) -> None:
    """See the reference, whose bits these are. Raises ValueError for tensors of other dtypes or numbers of entries."""
    factors = factor if isinstance(factor, Tensor) else None
    check_pulled(target, weights, anchor, source=source, factors=factors)
    launch(
        _pull,
        num_tiles(target.numel(), _TILE_NUMEL),
        target,
        target if source is None else source,
        weights,
        anchor,
        factors,
        0.0 if isinstance(factor, Tensor) else factor,
        target.numel(),
    )


def check_pulled(
    target: Tensor, weights: Tensor, anchor: Tensor, *, source: Tensor | None, factors: Tensor | None = None
) -> None:
    """Raise ValueError unless tensors have the entries that will be read or written."""
    given = {"target": target, "weights": weights, "anchor": anchor, "source": source, "factor": factors}
    for name, tensor in given.items():
        allowed = ANCHORS if name == "anchor" else (torch.float32,)
        if tensor is not None and (tensor.dtype not in allowed or tensor.numel() != target.numel()):
            raise ValueError(
                f"{name} has {tensor.numel()} entries of {tensor.dtype}; pass {target.numel()} of "
                f"{' or '.join(map(str, allowed))}"
            )


@kernel
def _pull(target, source, weights, anchor, factors, factor: tl.float32, numel: tl.int64):
    first = tl.program_id(0).to(tl.int64) * _TILE_NUMEL
    entry = tl.arange(0, _TILE_NUMEL)
    inside = entry < tl.minimum(numel - first, _TILE_NUMEL).to(tl.int32)
    moved = tl.load(weights + first + entry, mask=inside, other=0.0)
    moved -= tl.load(anchor + first + entry, mask=inside, other=0.0).to(tl.float32)
    if factors is not None:
        moved *= tl.load(factors + first + entry, mask=inside, other=0.0)
    else:
        moved *= factor
    tl.store(target + first + entry, tl.load(source + first + entry, mask=inside, other=0.0) + moved, mask=inside)


def specialisations() -> Iterator[Specialisation]:
    """Yield all that `pull_` may launch."""
    for anchor, of_each in product(ANCHORS.values(), (False, True)):
        pointers = {"target": "fp32", "source": "fp32", "weights": "fp32", "anchor": anchor}
        constants = {} if of_each else {"factors": None}
        if of_each:
            pointers["factors"] = "fp32"
        yield Specialisation(_pull, f"{anchor}, {'a factor of each' if of_each else 'one factor'}", pointers, constants)
