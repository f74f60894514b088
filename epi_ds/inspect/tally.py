"""Entries of a group of parameters, counted by their importance as they are read, piece by piece.

[Note: codes] What is counted are the upper 16 bits of an fp32 pattern below the sign: the codes of ``u16``. The order
of codes is the order of values, and eight of their bits are the exponent, so one count gives the median and the
histogram. Importance that is stored in 16 bits is counted as it is; of that in 32, or decoded from 8, the median is
rounded down to 9 significant bits, and all else is exact.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from epi_ds.isolation.importance.codes import codes_of, decode
from epi_ds.kernels import code_histogram_

_NUM_CODES = 1 << 16
_CODE_SHIFT = 15
# Codes that share an exponent.
_OCTAVE = 1 << 8


class Place(NamedTuple):
    """An entry of a parameter."""

    parameter: str
    at: tuple[int, ...]


class Octave(NamedTuple):
    """Entries whose importance lies in ``[floor, 2 * floor)``, that of the denormals below 2^-126 for floor 0."""

    floor: float
    entries: int
    isolated: int


class Spread(NamedTuple):
    """The importance of a group's entries."""

    smallest: float
    median: float
    """The lower one of an even number. See [Note: codes]."""
    largest: float
    largest_at: Place
    """The first of several."""
    total: float
    """Sum over the entries."""
    zeros: int
    """Entries of no importance at all."""
    octaves: tuple[Octave, ...]
    """The histogram of what is not zero; octaves without entries are left out at its ends."""


class Tally:
    """Counts of a group of entries."""

    def __init__(self) -> None:
        self.entries = 0
        self.isolated = 0
        # Of all entries, and of those that are isolated.
        self._zeros = [0, 0]
        self._total = 0.0
        self._smallest = math.inf
        self._largest = -math.inf
        self._largest_at = Place("", ())
        # Likewise; [2, codes].
        self._counts = torch.zeros((2, _NUM_CODES), dtype=torch.int64)

    def count(self, mask: Tensor) -> None:
        """Take in entries whose importance is not known. ``mask`` is bool."""
        self.entries += mask.numel()
        self.isolated += int(torch.count_nonzero(mask))

    def measure(self, values: Tensor, mask: Tensor, *, name: str, shape: tuple[int, ...], start: int) -> None:
        """Take in neighbouring entries of a parameter.

        values  [numel] fp32, finite and not negative, at least one
        mask    [numel] bool
        shape   of the whole parameter
        start   index of the first one in the flattened parameter
        """
        self.count(mask)
        for index, part in enumerate((values, values[mask])):
            # torch has few operations on uint16.
            code_histogram_(self._counts[index], (codes_of(part) >> _CODE_SHIFT).to(torch.int16).view(torch.uint16))
            self._zeros[index] += part.numel() - int(torch.count_nonzero(part))
        self._total += float(values.sum(dtype=torch.float64))
        self._smallest = min(self._smallest, float(values.min()))
        if float(values.max()) > self._largest:
            self._largest = float(values.max())
            self._largest_at = Place(name, _index(start + int(values.argmax()), shape))

    def add(self, other: Tally) -> None:
        """Take in another group's entries."""
        self.entries += other.entries
        self.isolated += other.isolated
        self._zeros = [own + others for own, others in zip(self._zeros, other._zeros, strict=True)]
        self._total += other._total
        self._smallest = min(self._smallest, other._smallest)
        if other._largest > self._largest:
            self._largest, self._largest_at = other._largest, other._largest_at
        self._counts += other._counts

    @property
    def spread(self) -> Spread | None:
        """The importance of the entries; None where none was measured."""
        measured = int(self._counts[0].sum())
        if not measured:
            return None
        reached = torch.cumsum(self._counts[0], 0)
        code = int(torch.searchsorted(reached, (measured - 1) // 2, right=True))
        return Spread(
            smallest=self._smallest,
            # Below the smallest it would only be by what is rounded off.
            median=max(_value(code), self._smallest),
            largest=self._largest,
            largest_at=self._largest_at,
            total=self._total,
            zeros=self._zeros[0],
            octaves=self._octaves(),
        )

    def _octaves(self) -> tuple[Octave, ...]:
        counts = self._counts.view(2, -1, _OCTAVE).sum(-1)
        counts[:, 0] -= torch.tensor(self._zeros)
        used = torch.nonzero(counts[0]).flatten().tolist()
        if not used:
            return ()
        entries, isolated = counts.tolist()
        return tuple(
            Octave(_value(index * _OCTAVE), entries[index], isolated[index]) for index in range(used[0], used[-1] + 1)
        )


def _value(code: int) -> float:
    return float(decode(torch.tensor([code << _CODE_SHIFT]))[0])


def _index(position: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        position, remainder = divmod(position, size)
        index.append(remainder)
    return tuple(reversed(index))
