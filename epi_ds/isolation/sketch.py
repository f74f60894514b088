"""Mergeable summaries of one rank's importance. Merging is adding integers (or taking their maximum).

[Note: sketches] Every summary here is exact where it is asked, is made of integers only, and merges by SUM or MAX. So
thresholds made from merged sketches cannot depend on the number of ranks, on where partitions are cut, on the
transport, or on the order of a reduction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from epi_ds.kernels import sketch_counts

# Travels instead of an extreme where a rank holds nothing of a layer: below every code and every negated code.
EMPTY = -(1 << 40)

# See `PartitionSketch.fixed_point_sums`.
FRACTION_BITS = 52
LOW_BITS = 26
_SIGNIFICAND_BITS = 24


class Piece(NamedTuple):
    """Codes of one layer on this rank."""

    layer: int
    codes: Callable[[], Iterable[Tensor]]
    """Yields the codes, int32 without padding, in pieces of any size on any device; asked anew for every question."""


class PartitionSketch:
    """Answers questions about the codes of one rank's partitions, layer by layer. Reads them, keeps nothing."""

    def __init__(self, pieces: Sequence[Piece], *, num_layers: int) -> None:
        """A layer may have no piece, one or many."""
        self._pieces = pieces
        self.num_layers = num_layers

    def _codes(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (layer, codes), without empty pieces."""
        for layer, codes in self._pieces:
            yield from ((layer, chunk) for chunk in codes() if chunk.numel())

    def extremes(self) -> Tensor:
        """Return ``[2, num_layers]`` int64 on the CPU: largest code, negated smallest code. Merge by MAX."""
        result = torch.full((2, self.num_layers), EMPTY, dtype=torch.int64)
        for layer, codes in self._codes():
            smallest, largest = torch.aminmax(codes)
            result[0, layer] = max(int(result[0, layer]), int(largest))
            result[1, layer] = max(int(result[1, layer]), -int(smallest))
        return result

    def fixed_point_sums(self, max_codes: Tensor) -> Tensor:
        """Return ``[2, num_layers]`` int64 on the CPU: high and low limbs of the layers' exact sums. Merge by SUM.

        Every entry is read as an integer in units of its layer's largest binade / 2^52, floored; the 2^53 bound of
        one entry is split at 26 bits, so that sums stay exact up to 2^36 entries. A floating-point sum would depend
        on the partitioning.

        max_codes  [num_layers] int64: largest code of each layer over all ranks, `EMPTY` or a code
        """
        result = torch.zeros((2, self.num_layers), dtype=torch.int64)
        for layer, codes in self._codes():
            largest_exponent = max(1, int(max_codes[layer]) >> 23)
            piece = codes.long()
            exponent = piece >> 23
            hidden_bit = (exponent > 0).long() << 23
            significand = (piece & ((1 << 23) - 1)) | hidden_bit
            distance = largest_exponent - exponent.clamp(min=1)
            shifted = significand << (FRACTION_BITS + 1 - _SIGNIFICAND_BITS)
            fixed = torch.where(distance > FRACTION_BITS + 1, 0, shifted >> distance.clamp(max=63))
            result[0, layer] += int((fixed >> LOW_BITS).sum())
            result[1, layer] += int((fixed & ((1 << LOW_BITS) - 1)).sum())
        return result

    def counts(self, edges: Tensor) -> Tensor:
        """Count entries at or above per-layer edges. ``[num_layers, num_edges]`` int64 on the CPU. Merge by SUM.

        edges  [num_layers, num_edges] int64 on the CPU, never falling along the second dimension
        """
        result = torch.zeros(edges.shape, dtype=torch.int64)
        for layer, codes in self._codes():
            grid = edges[layer].to(device=codes.device, dtype=torch.int32)
            result[layer] += sketch_counts(codes, grid).cpu()
        return result
