"""Mergeable summaries of one rank's importance. Merging is adding integers (or taking their maximum).

[Note: sketches] Every summary here is exact where it is asked, is made of integers only, and merges by SUM or MAX. So
thresholds made from merged sketches cannot depend on the number of ranks, on where partitions are cut, on the
transport, or on the order of a reduction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from epi_ds.kernels import sketch_counts
from epi_ds.kernels.reference.chunks import CHUNK_NUMEL

# Travels instead of an extreme where a rank holds nothing of a layer: below every code and every negated code.
EMPTY = -(1 << 62)

# A largest code travels with the parameter that holds it in its low bits; among equals the first parameter wins.
_PARAMETER_BITS = 31
_LAST_PARAMETER = (1 << _PARAMETER_BITS) - 1

# See `PartitionSketch.fixed_point_sums`.
FRACTION_BITS = 52
LOW_BITS = 26
_SIGNIFICAND_BITS = 24


class SegmentCodes(NamedTuple):
    """Codes of one parameter on this rank."""

    layer: int
    parameter: int
    """Index of the parameter, the same on every rank."""
    codes: Callable[[], Iterable[Tensor]]
    """Yields the codes, int32 without padding, in chunks of any size on any device; asked anew for every question."""


class Extremes(NamedTuple):
    """The extremes of every layer over all ranks: ``[num_layers]`` int64 on the CPU, -1 for a layer without entries."""

    max_codes: Tensor
    min_codes: Tensor
    holders: Tensor
    """Index of the first parameter that holds the largest code."""


def read_extremes(merged: Tensor) -> Extremes:
    """Read the merge by MAX of the ranks' `PartitionSketch.extremes`."""
    empty = merged[0] == EMPTY
    columns = merged[0] >> _PARAMETER_BITS, -merged[1], _LAST_PARAMETER - (merged[0] & _LAST_PARAMETER)
    return Extremes(*(column.masked_fill(empty, -1) for column in columns))


class Sketch(Protocol):
    """What a search asks about the codes of one rank."""

    num_layers: int

    def extremes(self) -> Tensor:
        """See `PartitionSketch.extremes`."""

    def fixed_point_sums(self, max_codes: Tensor) -> Tensor:
        """See `PartitionSketch.fixed_point_sums`."""

    def counts(self, edges: Tensor, *, dtype: torch.dtype = torch.int64) -> Tensor:
        """See `PartitionSketch.counts`."""


def empty_extremes(num_layers: int) -> Tensor:
    """Return the extremes of no entries. ``[2, num_layers]`` int64 on the CPU"""
    return torch.full((2, num_layers), EMPTY, dtype=torch.int64)


def take_extremes(extremes: Tensor, smallest: int, largest: int, *, layer: int, parameter: int) -> None:
    """Let the smallest and the largest code of some entries enter ``extremes``, in place."""
    packed = largest << _PARAMETER_BITS | _LAST_PARAMETER - parameter
    extremes[0, layer] = max(int(extremes[0, layer]), packed)
    extremes[1, layer] = max(int(extremes[1, layer]), -smallest)


def add_fixed_point(
    sums: Tensor, codes: Tensor, *, layer: int, max_code: int, occurrences: Tensor | None = None
) -> None:
    """Add the values of codes to a layer's limbs in ``sums``, in place. See `PartitionSketch.fixed_point_sums`.

    occurrences  int64, how often each code counts; None is once
    """
    largest_exponent = max(1, max_code >> 23)
    wide = codes.long()
    exponent = wide >> 23
    hidden_bit = (exponent > 0).long() << 23
    significand = (wide & ((1 << 23) - 1)) | hidden_bit
    distance = largest_exponent - exponent.clamp(min=1)
    shifted = significand << (FRACTION_BITS + 1 - _SIGNIFICAND_BITS)
    fixed = torch.where(distance > FRACTION_BITS + 1, 0, shifted >> distance.clamp(max=63))
    for row, limb in enumerate((fixed >> LOW_BITS, fixed & ((1 << LOW_BITS) - 1))):
        sums[row, layer] += int((limb if occurrences is None else limb * occurrences).sum())


class PartitionSketch:
    """Answers questions about the codes of one rank's partitions, layer by layer. Reads them, keeps nothing."""

    def __init__(self, segments: Sequence[SegmentCodes], *, num_layers: int) -> None:
        """A layer may have no segment, one or many."""
        self._by_layer: dict[int, list[SegmentCodes]] = {}
        for segment in segments:
            self._by_layer.setdefault(segment.layer, []).append(segment)
        self.num_layers = num_layers

    def _chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (layer, codes) without empty ones.

        Small ones of a layer are joined: with a thousand layers of a dozen parameters on a thousand ranks, most of the
        time would go into calls for a few hundred entries each.
        """
        for layer, segments in self._by_layer.items():
            small: list[Tensor] = []
            for codes in (codes for segment in segments for codes in segment.codes()):
                full = sum(part.numel() for part in small) + codes.numel() > CHUNK_NUMEL
                if small and (full or small[0].device != codes.device):
                    yield layer, _joined(small)
                    small = []
                if codes.numel():
                    small.append(codes)
            if small:
                yield layer, _joined(small)

    def extremes(self) -> Tensor:
        """Return ``[2, num_layers]`` int64 on the CPU, to merge by MAX and to read by `read_extremes`."""
        result = empty_extremes(self.num_layers)
        for segment in (segment for segments in self._by_layer.values() for segment in segments):
            for codes in segment.codes():
                if codes.numel():
                    smallest, largest = (int(extreme) for extreme in torch.aminmax(codes))
                    take_extremes(result, smallest, largest, layer=segment.layer, parameter=segment.parameter)
        return result

    def fixed_point_sums(self, max_codes: Tensor) -> Tensor:
        """Return ``[2, num_layers]`` int64 on the CPU: high and low limbs of the layers' exact sums. Merge by SUM.

        Every entry is read as an integer in units of its layer's largest binade / 2^52, floored; the 2^53 bound of
        one entry is split at 26 bits, so that sums stay exact up to 2^36 entries. A floating-point sum would depend
        on the partitioning.

        max_codes  [num_layers] int64: largest code of each layer over all ranks; anything for an empty layer
        """
        result = torch.zeros((2, self.num_layers), dtype=torch.int64)
        for layer, codes in self._chunks():
            add_fixed_point(result, codes, layer=layer, max_code=int(max_codes[layer]))
        return result

    def counts(self, edges: Tensor, *, dtype: torch.dtype = torch.int64) -> Tensor:
        """Count entries at or above per-layer edges. ``[num_layers, num_edges]`` on the CPU. Merge by SUM.

        edges  [num_layers, num_edges] integer codes on the CPU, never falling along the second dimension
        dtype  of the counts: one that holds their sums over all ranks, see `count_dtype`
        """
        result = torch.zeros(edges.shape, dtype=dtype)
        grids = edges.to(torch.int32)
        for layer, codes in self._chunks():
            result[layer] += sketch_counts(codes, grids[layer].to(codes.device)).to("cpu", dtype)
        return result


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
