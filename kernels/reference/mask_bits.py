"""Isolation masks as bits: entry j is bit ``j % 8`` of byte ``j // 8``, 1 = isolated."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from epi_ds.kernels.reference.chunks import chunks
from torch import Tensor


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def pack_bits(mask: Tensor, bits: Tensor) -> None:
    """Write a bool mask as bits.

    mask  [numel]            bool
    bits  [ceil(numel / 8)]  uint8, overwritten; the unused bits of the last byte become 0
    """
    padded = torch.zeros(bits.numel() * 8, dtype=torch.uint8, device=mask.device)
    padded[: mask.numel()] = mask
    # At most one of the eight addends has each bit, so a sum is an OR.
    torch.sum(padded.view(-1, 8) << _shifts(mask.device), dim=1, dtype=torch.uint8, out=bits)


def unpack_bits(bits: Tensor, start: int, stop: int) -> Tensor:
    """Return entries ``[start, stop)`` of a mask as bool. [stop - start], on the device of ``bits``."""
    first_byte = start // 8
    covered = bits[first_byte : -(-stop // 8)]
    expanded = (covered.unsqueeze(1) >> _shifts(bits.device)) & 1
    return expanded.view(-1)[start - first_byte * 8 : stop - first_byte * 8].bool()


def count_bits(bits: Tensor) -> int:
    """Return how many bits are set. Synchronises with the device."""
    total = 0
    for start, stop in chunks(0, bits.numel()):
        total += int(unpack_bits(bits, start * 8, stop * 8).sum())
    return total


def masked_chunks(bits: Tensor, start: int, stop: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield ``(slice, bool mask)`` for the pieces of ``[start, stop)`` that hold at least one isolated entry."""
    for first, last in chunks(start, stop):
        if bits[first // 8 : -(-last // 8)].any():
            mask = unpack_bits(bits, first, last)
            if mask.any():
                yield slice(first, last), mask


def mask_(gradient: Tensor, bits: Tensor) -> None:
    """Set the isolated entries of ``gradient`` to zero, in place.

    gradient  [numel]            any float dtype, mutated
    bits      [ceil(numel / 8)]  uint8

    Never a multiplication: NaN * 0 is NaN.
    """
    for piece, mask in masked_chunks(bits, 0, gradient.numel()):
        gradient[piece].masked_fill_(mask, 0.0)


def masked_sumsq(values: Tensor, bits: Tensor, *, start: int, stop: int) -> Tensor:
    """Return the sum of squares of the entries in ``[start, stop)`` that are not isolated. [] fp64, on the device."""
    total = torch.zeros((), dtype=torch.float64, device=values.device)
    for first, last in chunks(start, stop):
        piece = values[first:last].double()
        total += piece.masked_fill_(unpack_bits(bits, first, last), 0.0).square_().sum()
    return total
