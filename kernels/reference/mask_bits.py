"""Isolation masks as bits: entry j is bit ``j % 8`` of byte ``j // 8``, 1 = isolated."""

from __future__ import annotations

import torch
from torch import Tensor

from epi_ds.kernels.reference.chunks import chunks


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


def slice_bits(bits: Tensor, start: int, stop: int) -> Tensor:
    """Return entries ``[start, stop)`` of a mask as bits of their own, a copy: what `pack_bits` makes of them.

    [ceil((stop - start) / 8)] uint8, on the device of ``bits``
    """
    first_byte, shift, length = start // 8, start % 8, -(-(stop - start) // 8)
    own = bits[first_byte : first_byte + length] >> shift
    if shift:
        following = bits[first_byte + 1 : first_byte + 1 + length]
        own[: following.numel()] |= following << (8 - shift)
    if last := (stop - start) % 8:
        own[-1] &= (1 << last) - 1
    return own


def set_bits(bits: Tensor, mask: Tensor, first_entry: int) -> None:
    """Overwrite neighbouring entries of a mask in place.

    bits  [ceil(numel / 8)]  uint8, mutated
    mask  bool, the entries from ``first_entry`` on
    """
    for start, stop in chunks(first_entry, first_entry + mask.numel()):
        first_byte, last_byte = start // 8, -(-stop // 8)
        # Whole bytes are rewritten: neighbours that share the first or the last byte keep their entries.
        entries = unpack_bits(bits, first_byte * 8, last_byte * 8)
        entries[start - first_byte * 8 : stop - first_byte * 8] = mask[start - first_entry : stop - first_entry]
        pack_bits(entries, bits[first_byte:last_byte])
