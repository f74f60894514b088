"""A pull towards an anchor: ``target <- source + factor * (w - a)``, where the source is mostly the target itself.

[Note: pull] The same operation twice. With the weights themselves for a target, and minus a share for a factor, they go
that share of the way back to the anchor; with their gradient for a target it becomes that of a quadratic penalty.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epi_ds.kernels.reference.chunks import chunks


def pull_(
    target: Tensor, weights: Tensor, anchor: Tensor, factor: float | Tensor, *, source: Tensor | None = None
) -> None:
    """Add a multiple of what the weights have moved by to a tensor, in place. See [Note: pull].

    target   [numel]  fp32, mutated; may be ``weights``
    source   [numel]  fp32, what it is added to and the target overwritten by; None for the target itself
    weights  [numel]  fp32
    anchor   [numel]  fp32 or bfloat16, same device
    factor   of all entries; or [numel] fp32, one of each

    Three roundings an entry: of the difference, of the product, and of the sum.
    """
    for start, stop in chunks(0, target.numel()):
        moved = weights[start:stop] - anchor[start:stop].float()
        moved.mul_(factor if isinstance(factor, float) else factor[start:stop])
        torch.add((target if source is None else source)[start:stop], moved, out=target[start:stop])
