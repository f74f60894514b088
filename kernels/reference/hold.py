"""Keep isolated entries bit for bit through an update that does not know of them."""

from __future__ import annotations

from epi_ds.kernels.reference.mask_bits import count_bits, masked_chunks
from torch import Tensor


def hold(values: Tensor, bits: Tensor) -> Tensor:
    """Return a copy of the isolated entries of ``values``, in order.

    values  [numel]            any dtype, untouched
    bits    [ceil(numel / 8)]  uint8
    """
    # Sized beforehand: joining the pieces of chunks would need the room twice.
    held = values.new_empty(count_bits(bits))
    start = 0
    for piece, mask in masked_chunks(bits, 0, values.numel()):
        found = values[piece][mask]
        held[start : start + found.numel()] = found
        start += found.numel()
    return held


def restore_(values: Tensor, bits: Tensor, held: Tensor) -> None:
    """Write the entries that `hold` saved back into ``values``, in place. ``bits`` must be the same."""
    start = 0
    for piece, mask in masked_chunks(bits, 0, values.numel()):
        count = int(mask.sum())
        values[piece].masked_scatter_(mask, held[start : start + count])
        start += count
