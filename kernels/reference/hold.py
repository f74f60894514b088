"""Isolated entries counted, kept through an update that does not know of them, and set to zero."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from epi_ds.kernels.reference.chunks import chunks
from epi_ds.kernels.reference.mask_bits import unpack_bits


def hold(values: Tensor, bits: Tensor, num_isolated: int) -> Tensor:
    """Return a copy of the isolated entries of ``values``, in order. [num_isolated]

    values        [numel]            any dtype, untouched
    bits          [ceil(numel / 8)]  uint8
    num_isolated  bits that are set: known beforehand, so that no device has to be asked

    Raises ValueError for another number where that shows, as it does here.
    """
    # Sized beforehand: joining what chunks hold would need the room twice.
    held = values.new_empty(num_isolated)
    start = 0
    for chunk, mask in _masked_chunks(bits, values.numel()):
        found = values[chunk][mask]
        if start + found.numel() <= num_isolated:
            held[start : start + found.numel()] = found
        start += found.numel()
    if start != num_isolated:
        raise ValueError(f"{start} entries are isolated, and not {num_isolated}")
    return held


def restore_(values: Tensor, bits: Tensor, held: Tensor) -> None:
    """Write the entries that `hold` saved back into ``values``, in place. ``bits`` must be the same."""
    start = 0
    for chunk, mask in _masked_chunks(bits, values.numel()):
        count = int(mask.sum())
        values[chunk].masked_scatter_(mask, held[start : start + count])
        start += count


def mask_(values: Tensor, bits: Tensor) -> None:
    """Set the isolated entries of ``values`` to zero, in place.

    values  [numel]            any dtype, mutated
    bits    [ceil(numel / 8)]  uint8

    Never a multiplication: NaN * 0 is NaN.
    """
    for chunk, mask in _masked_chunks(bits, values.numel()):
        values[chunk].masked_fill_(mask, 0)


def count_bits(bits: Tensor) -> int:
    """Return how many bits are set. Synchronises with the device."""
    total = 0
    for start, stop in chunks(0, bits.numel()):
        total += int(unpack_bits(bits, start * 8, stop * 8).sum())
    return total


def _masked_chunks(bits: Tensor, numel: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield ``(slice, bool mask)`` for the chunks that hold at least one isolated entry."""
    for first, last in chunks(0, numel):
        if bits[first // 8 : -(-last // 8)].any():
            yield slice(first, last), unpack_bits(bits, first, last)
