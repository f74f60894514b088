"""How the rest of the house reads importance, whoever keeps it, and what else can be read as if it were importance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from epi_ds.isolation.importance.codes import codes_of
from epi_ds.isolation.layout import Segment, parts_within
from epi_ds.isolation.placement import Placement
from epi_ds.kernels import chunks, unpack_bits


class Importance(Protocol):
    """Importance of this rank's covered entries, whoever keeps it."""

    @property
    def code_shift(self) -> int:
        """All codes of the values are multiples of ``1 << code_shift``; see [Note: lattice] in threshold.py."""

    def read(self, segment: Segment, start: int, stop: int) -> Tensor:
        """Return entries ``[start, stop)`` of a segment: fp32 on the home device, finite, not to be written to."""


# Reads entries [start, stop) of a flat partition as fp32; entries that are not covered are zero.
ReadPartition = Callable[[int, int], Tensor]


def code_chunks(importance: Importance, segment: Segment) -> Iterator[Tensor]:
    """Yield the codes of a segment in order, int32, in chunks that keep temporaries small."""
    for start, stop in chunks(0, segment.real_numel):
        yield codes_of(importance.read(segment, start, stop))


def isolated_code_chunks(importance: Importance, segment: Segment, bits: Tensor) -> Iterator[Tensor]:
    """Yield the codes of a segment's isolated entries; ``bits`` are the mask of its sub-group's partition."""
    for start, stop in chunks(0, segment.real_numel):
        mask = unpack_bits(bits, segment.start + start, segment.start + stop)
        yield codes_of(importance.read(segment, start, stop))[mask]


def partition_reader(importance: Importance, placement: Placement, sub_group: int) -> ReadPartition:
    """Return a reader of the flat partition of a sub-group."""
    segments, device = placement.layout.by_sub_group[sub_group], placement.devices[sub_group]

    def read(start: int, stop: int) -> Tensor:
        values = torch.zeros(stop - start, device=device)
        for segment, first, last in parts_within(segments, start, stop):
            values[first - start : last - start] = importance.read(segment, first - segment.start, last - segment.start)
        return values

    return read


class Nothing:
    """Importance of nothing: zeros, of which none is ever isolated."""

    def __init__(self, placement: Placement, *, code_shift: int) -> None:
        """Zeros lie on every lattice; ``code_shift`` is that of the importance that is to come, so that a search does
        not change with it.
        """
        self._placement = placement
        self.code_shift = code_shift

    def read(self, segment: Segment, start: int, stop: int) -> Tensor:
        """See `Importance.read`."""
        return torch.zeros(stop - start, device=self._placement.home_of(segment))


class Larger:
    """The larger of two importances, entry by entry."""

    def __init__(self, one: Importance, other: Importance) -> None:
        self.one, self.other = one, other
        self.code_shift = min(one.code_shift, other.code_shift)

    def read(self, segment: Segment, start: int, stop: int) -> Tensor:
        """See `Importance.read`."""
        return torch.maximum(self.one.read(segment, start, stop), self.other.read(segment, start, stop))


class Favoured:
    """Importance as selection sees it under hysteresis: of entries isolated now, divided by a power of two.

    Division by a power of two is exact, so thresholds stay independent of partitioning; it changes who is isolated,
    never how many.
    """

    def __init__(self, importance: Importance, bits: Sequence[Tensor], hysteresis: float) -> None:
        """``bits`` are the masks in force, by sub-group."""
        self._importance = importance
        self.code_shift = importance.code_shift
        self._bits = bits
        self._factor = 1.0 / hysteresis

    def read(self, segment: Segment, start: int, stop: int) -> Tensor:
        """See `Importance.read`."""
        values = self._importance.read(segment, start, stop)
        isolated = unpack_bits(self._bits[segment.sub_group], segment.start + start, segment.start + stop)
        favoured = (values * self._factor).clamp_(max=torch.finfo(torch.float32).max)
        return torch.where(isolated, favoured, values)
