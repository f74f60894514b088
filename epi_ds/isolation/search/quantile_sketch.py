"""A mergeable summary of non-negative numbers that answers quantiles with an exact bound on its error.

It is one row of what a refresh exchanges: true counts at the edges of a grid of codes ([Note: brackets]), in a form to
keep, send and ask.
"""

from __future__ import annotations

import math
import struct
import zlib
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from epi_ds.errors import UserError
from epi_ds.isolation.importance.codes import TOP_CODE, codes_of, decode
from epi_ds.isolation.search.bracket import Brackets, choose
from epi_ds.kernels import sketch_counts

# [Note: wire] magic, version, below, above, width; then width + 2 bins as base-128 numbers, low digits first, the high
# bit of a byte saying that more follow; then the CRC-32 of all before. Equal sketches have equal bytes.
# The codec is our own: most bins are empty and take one byte so, instead of eight, and no dependency has one.
_MAGIC = b"EPIQ"
_VERSION = 1
_HEADER = struct.Struct("<4sBIII")
_CHECKSUM = struct.Struct("<I")
_LARGEST_TOTAL = (1 << 63) - 1


class Quantile(NamedTuple):
    """An answer of a `QuantileSketch`."""

    value: float
    """The smallest edge of the grid with at most the asked share of entries at or above it; inf for the last one."""
    code: int
    """Its fp32 pattern."""
    at_or_above: int
    """Entries at or above it: exact, not an estimate."""
    rank_error: int
    """Most entries by which ``at_or_above`` may fall short of the best number within the asked share that any value
    reaches. 0 proves that the quantile is exact."""


class QuantileSketch:
    """Counts of non-negative fp32 numbers at or above the edges of a grid of their bit patterns.

    Merging adds integers: associative, commutative, and equal to the sketch of all numbers together. Size depends on
    the grid alone (the whole range: 2 to 18 kB as bytes). The default grid has 8 edges in every binade, so a quantile
    is at most a factor of 1.125 above the exact one (denormals apart); `refined` answers it exactly in a few rounds.

    Where Karnin, Lang and Liberty (Optimal Quantile Approximation in Streams, 2016; arXiv 1603.05346) bound the rank
    error with high probability for any order, this bounds it for certain from its own counts, for codes alone.
    """

    def __init__(self, *, below: int = 0, above: int = TOP_CODE, width: int = 2048) -> None:
        """Start empty, on ``width`` edges in ``(below, above]``, which are fp32 patterns.

        Raises UserError unless 0 <= below < above <= `TOP_CODE` and width > 0.
        """
        if not 0 <= below < above <= TOP_CODE or width < 1:
            raise UserError(
                f"a sketch counts at edges in (below, above] with 0 <= below < above <= {TOP_CODE:#x}, and at least "
                f"one; got below={below:#x}, above={above:#x}, width={width}"
            )
        self.below, self.above, self.width = below, above, width
        self.num_entries = 0
        # Entries at or above `below`, and at or above every edge of the grid, as one row of a search counts them.
        self._counts = torch.zeros(width + 1, dtype=torch.int64)
        self._edges = self._bracket().edges(width)

    def add(self, values: Tensor) -> None:
        """Count the values, any shape and device, fp32; untouched.

        Raises UserError for another dtype and for negative, infinite or nan values; nothing is counted then.
        """
        if values.dtype != torch.float32:
            raise UserError(
                f"a sketch counts fp32 bit patterns, got {values.dtype}; convert with .float(), exact for 16-bit types"
            )
        if not values.numel():
            return
        codes = codes_of(values.detach().contiguous().view(-1))
        smallest, largest = (int(extreme) for extreme in torch.aminmax(codes))
        if smallest < 0 or largest >= TOP_CODE:
            raise UserError(
                "a sketch counts non-negative finite numbers, whose bit patterns are ordered as they are; got "
                f"{'a negative number, -0.0 or nan' if smallest < 0 else 'inf or nan'} among {values.numel()} values; "
                "use abs() and leave out what is not finite"
            )
        edges = self._grid().to(codes.device)
        self._counts += sketch_counts(codes, edges).cpu()
        self.num_entries += codes.numel()

    def merge(self, other: QuantileSketch) -> QuantileSketch:
        """Return the sketch of the entries of both, which stay as they are.

        Raises UserError for sketches on different grids.
        """
        grid, other_grid = (self.below, self.above, self.width), (other.below, other.above, other.width)
        if grid != other_grid:
            raise UserError(
                f"only sketches on one grid can be merged, got (below, above, width) {grid} and {other_grid}; "
                "make both with the same arguments, or refine the same merged sketch"
            )
        merged = QuantileSketch(below=self.below, above=self.above, width=self.width)
        merged.num_entries = self.num_entries + other.num_entries
        merged._counts = self._counts + other._counts
        return merged

    def quantile(self, q: float | Fraction) -> Quantile:
        """Return the smallest edge with at most ``floor((1 - q) * num_entries)`` entries at or above it.

        ``q`` is read as a decimal, as the ratio of a refresh is: isolating the top 1 % is ``quantile(0.99)``.

        Raises UserError for q outside [0, 1], for an empty sketch, and for a refined sketch of another quantile.
        """
        budget = self._budget(q)
        narrowed = self._narrowed(budget)
        code, count = int(narrowed.above), int(narrowed.count_above)
        value = float(decode(narrowed.above)) if code < TOP_CODE else math.inf
        # Neighbouring codes: there is no value between them that could do better.
        exact = code - int(narrowed.below) == 1
        # The best value lies in this bracket; it keeps within budget, and isolates no more than the edge below does.
        return Quantile(value, code, count, 0 if exact else min(budget, int(narrowed.count_below)) - count)

    def rank_error_bound(self) -> int:
        """Return what no quantile's ``rank_error`` exceeds: the fullest bin between two edges; 0 where it is exact."""
        return int(torch.where(self._grid().diff() > 1, self._bins()[1:-1], 0).max())

    def refined(self, q: float | Fraction, *, width: int = 1024) -> QuantileSketch:
        """Return an empty sketch with a finer grid around a quantile: add the same values, and ask it the same.

        Refining narrows by a factor of ``width``; from the default grid, two rounds of 1024 are exact.

        Raises UserError as `quantile` does.
        """
        narrowed = self._narrowed(self._budget(q))
        return QuantileSketch(below=int(narrowed.below), above=int(narrowed.above), width=width)

    def to_bytes(self) -> bytes:
        """Return the wire form: the same bytes for equal sketches, on every machine. See [Note: wire]."""
        body = bytearray(_HEADER.pack(_MAGIC, _VERSION, self.below, self.above, self.width))
        for mass in self._bins().tolist():
            while mass >= 0x80:
                body.append(mass & 0x7F | 0x80)
                mass >>= 7
            body.append(mass)
        return bytes(body) + _CHECKSUM.pack(zlib.crc32(body))

    @classmethod
    def from_bytes(cls, data: bytes) -> QuantileSketch:
        """Return the sketch of a wire form.

        Raises UserError for bytes that `to_bytes` cannot have written; memory stays within 16 times their length.
        """
        if len(data) < _HEADER.size + _CHECKSUM.size:
            raise _damaged(f"{len(data)} bytes are fewer than its header and checksum take")
        body = data[: -_CHECKSUM.size]
        magic, version, below, above, width = _HEADER.unpack_from(body)
        if magic != _MAGIC or version != _VERSION:
            raise _damaged(f"it begins with {magic!r} and version {version}, not {_MAGIC!r} and {_VERSION}")
        if zlib.crc32(body) != _CHECKSUM.unpack(data[-_CHECKSUM.size :])[0]:
            raise _damaged("its checksum does not match")
        # Before a grid is made of it: each bin takes at least one byte.
        if width + 2 > len(body) - _HEADER.size:
            raise _damaged(f"{len(body) - _HEADER.size} bytes cannot hold {width + 2} bins")
        sketch = cls(below=below, above=above, width=width)
        bins = _read_bins(body[_HEADER.size :])
        if len(bins) != width + 2 or sum(bins) > _LARGEST_TOTAL:
            raise _damaged(f"it holds {len(bins)} bins with {sum(bins)} entries, not {width + 2} bins below 2^63")
        sketch.num_entries = sum(bins)
        sketch._counts = torch.tensor(bins).flip(0).cumsum(0).flip(0)[1:]
        return sketch

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QuantileSketch) and self.to_bytes() == other.to_bytes()

    __hash__ = None  # type: ignore[assignment]  # add() mutates it

    def _bins(self) -> Tensor:
        """Return ``[width + 2]`` int64: entries under ``below``, between neighbouring edges, and from ``above`` on."""
        return -torch.cat([torch.tensor([self.num_entries]), self._counts, torch.tensor([0])]).diff()

    def _budget(self, q: float | Fraction) -> int:
        share = 1 - Fraction(str(q)) if math.isfinite(q) else Fraction(-1)
        if not 0 <= share <= 1:
            raise UserError(f"a quantile lies in [0, 1], got {q}")
        if not self.num_entries:
            raise UserError("an empty sketch has no quantile; add values first")
        return math.floor(share * self.num_entries)

    def _grid(self) -> Tensor:
        """Return ``[width + 1]`` int32: ``below`` and the edges."""
        return torch.cat([torch.tensor([self.below], dtype=torch.int32), self._edges[0]])

    def _bracket(self) -> Brackets:
        numbers = self.below, self.above, int(self._counts[0]), int(self._counts[-1])
        return Brackets(*(torch.tensor([number]) for number in numbers))

    def _narrowed(self, budget: int) -> Brackets:
        if int(self._counts[-1]) > budget or (self.below > 0 and int(self._counts[0]) <= budget):
            raise UserError(
                f"this sketch counts in ({self.below:#x}, {self.above:#x}] only, and the quantile lies outside; ask "
                "the sketch of the whole range, and refine that"
            )
        return self._bracket().narrow(self._edges, choose(self._counts[1:].unsqueeze(0), torch.tensor([budget])))


def _read_bins(data: bytes) -> list[int]:
    bins, mass, shift = [], 0, 0
    for byte in data:
        mass |= (byte & 0x7F) << shift
        shift += 7
        if shift > 63:
            raise _damaged("a count takes more than 63 bits")
        if byte & 0x80:
            continue
        if byte == 0 and shift > 7:
            raise _damaged("a count has a leading zero, so it is not what to_bytes writes")
        bins.append(mass)
        mass = shift = 0
    if shift:
        raise _damaged("it ends within a count")
    return bins


def _damaged(reason: str) -> UserError:
    return UserError(f"these bytes are no QuantileSketch: {reason}; read them as to_bytes() wrote them")
