"""The search for thresholds: from merged sketches to one integer code per layer.

[Note: search] ``normalized_global`` and ``raw_global`` look for tau, the smallest positive fp32 number with
``sum over layers of count(code >= T_l(tau)) <= budget``, by narrowing one bracket of tau's own bit pattern (see
[Note: brackets]). All layers share one grid of candidate taus; every rank counts its entries against the exact edges
``T_l(tau_j)``, and the counts are summed over the layers *before* they travel: one vector of at most 512 integers a
round, whatever the number of layers. fp64 multiplication and addition by non-negative numbers, `ceil_code`, max and
min are monotone, so counts never rise with tau and a true count at every grid point brackets tau exactly.
``per_layer`` narrows the codes of each layer in the same way, one bracket per layer.

[Note: rounds] A global round resolves up to 9 bits, so four rounds (256, 256, 256 and 128 edges) resolve the 31 of an
fp32 pattern. With three of 11, 10 and 10 the vectors alone would take 66 of the 100 kB that a refresh may move, and
counting would be no quicker: 0.53 s against 0.45 s for 1e7 entries on a CPU core, and 85 ms against 6 to 12 ms for the
edges of a round over 1000 layers. A ``per_layer`` round resolves up to 11 bits: with two collectives a round when
owners answer, a fourth round would be one too many.

[Note: lattice] A 16-bit state holds only codes that are multiples of ``1 << code_shift``. A threshold between two of
them isolates what the upper one does, so the search keeps to that lattice, and needs fewer rounds. tau of
``normalized_global`` is no entry's code and keeps all 31 bits.

Ties are not broken: a threshold never isolates more than its budget, and the next smaller one would.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from epi_ds.config import Normalizer, Selection
from epi_ds.isolation.bracket import Answers, Brackets, choose, count_dtype, round_widths
from epi_ds.isolation.importance import TOP_CODE, ceil_code, decode
from epi_ds.isolation.sketch import FRACTION_BITS, LOW_BITS, Extremes, PartitionSketch, read_extremes

CODE_BITS = 31
# See [Note: rounds].
GLOBAL_ROUND_BITS = 9
LAYER_ROUND_BITS = 11

# Distances between the edges of a preview, in codes: half a binade, and 2^-9 of one.
_COARSE_BITS = 22
_FINE_BITS = 14


class Exchange(Protocol):
    """Merges integer tensors over all ranks. Every rank gets the same bits."""

    def maximum(self, values: Tensor) -> Tensor:
        """Element-wise maximum over the ranks."""

    def total(self, values: Tensor) -> Tensor:
        """Element-wise sum over the ranks, of the values' dtype, which must hold it."""

    def answers(self, counts: Tensor, budgets: Tensor) -> Answers:
        """Return `choose` of the element-wise sum over the ranks of ``counts``, for all rows, to every rank.

        counts   [rows, edges] of a dtype that holds the sums; may be overwritten
        budgets  [rows] int64, the same on all ranks
        """


class Thresholds(NamedTuple):
    """What a search found. The same on every rank, bit for bit."""

    codes: Tensor
    """[num_layers] int64 on the CPU: an entry is isolated when its code is at or above its layer's."""
    budget: int
    """Most entries that may be isolated: the ratio times the covered entries, floored in decimal arithmetic."""
    tied_mass: int
    """How many more entries the next smaller threshold would isolate (``per_layer``: summed over the layers).

    The budget left unused is below it. Where there is no smaller threshold, because zeros are never isolated, all
    other entries count: a large part of them are zeros then."""
    extremes: Extremes
    row_codes: Tensor
    """What was searched: [num_layers] int64 for ``per_layer``, else [1], the code of tau."""


def budget_of(ratio: float, numel: int) -> int:
    """Return ``floor(ratio * numel)`` in decimal arithmetic; in binary, floor(0.29 * 100) is 28."""
    return math.floor(Fraction(str(ratio)) * numel)


class _Mapping(NamedTuple):
    """The affine map from tau to a layer's importance, ``y = minimum + tau * scale``, as fp64 ``[num_layers]``."""

    minimum: Tensor
    scale: Tensor
    lowest_code: Tensor
    """[num_layers] int64: below it nothing is isolated; `TOP_CODE` where a layer can never isolate."""

    def edges(self, tau_codes: Tensor) -> Tensor:
        """Return ``T_l(tau)``: [num_layers, num_taus] int64, never falling along the second dimension."""
        tau = decode(tau_codes)
        values = self.minimum.unsqueeze(1) + tau.unsqueeze(0) * self.scale.unsqueeze(1)
        return torch.maximum(ceil_code(values), self.lowest_code.unsqueeze(1))


def search_widths(selection: Selection, *, code_shift: int) -> tuple[int, ...]:
    """Return the edges of every round of a search. See [Note: rounds] and [Note: lattice]."""
    if selection is Selection.PER_LAYER:
        return round_widths(CODE_BITS - code_shift, most_bits=LAYER_ROUND_BITS)
    lattice_shift = code_shift if selection is Selection.RAW_GLOBAL else 0
    return round_widths(CODE_BITS - lattice_shift, most_bits=GLOBAL_ROUND_BITS)


class Preview(NamedTuple):
    """Counts of all ranks at the edges of one grid, before a search has a budget. Global selections only."""

    edges: Tensor
    """[num_edges] int64: codes of tau, never falling"""
    entries: Tensor
    """[num_edges] int64: entries at or above every edge"""
    isolated: Tensor
    """[num_edges] int64: of those, entries isolated now"""


class ThresholdSearch:
    """One search for thresholds over merged sketches. Collective: every rank must take the same steps."""

    def __init__(
        self,
        sketch: PartitionSketch,
        exchange: Exchange,
        *,
        layer_numel: tuple[int, ...],
        selection: Selection,
        normalizer: Normalizer,
        code_shift: int = 0,
        normalized_by: PartitionSketch | None = None,
    ) -> None:
        """Exchange the extremes of the layers, and their sums for the mean.

        normalized_by  whose extremes and sums normalise, where they are not those of ``sketch``
        code_shift  the state's codes are multiples of ``1 << code_shift``: 0 for fp32, 16 for bf16
        """
        self._sketch, self._exchange, self._layer_numel = sketch, exchange, layer_numel
        # Only the normalisers compute with them; the report of a refresh wants them for every selection.
        normalized_by = normalized_by or sketch
        self.extremes = read_extremes(exchange.maximum(normalized_by.extremes()))
        self._mapping: _Mapping | None = None
        if selection is Selection.RAW_GLOBAL:
            self._mapping = _raw_mapping(len(layer_numel))
        elif selection is Selection.NORMALIZED_GLOBAL:
            self._mapping = _normalizing_mapping(
                normalized_by, exchange, self.extremes, normalizer=normalizer, layer_numel=layer_numel
            )
        totals = torch.tensor(layer_numel, dtype=torch.int64)
        self._totals = totals if self._mapping is None else totals.sum(dim=0, keepdim=True)
        # tau of `normalized_global` is no entry's code.
        self._unit = 1 if selection is Selection.NORMALIZED_GLOBAL else 1 << code_shift
        self._widths = search_widths(selection, code_shift=code_shift)
        self._brackets = Brackets.whole(self._totals, top=TOP_CODE)
        self._preview: Preview | None = None

    def budgets(self, ratio: float) -> Tensor:
        """Return what a ratio allows: [num_layers] int64 for ``per_layer``, else [1]."""
        return torch.tensor([budget_of(ratio, numel) for numel in self._totals.tolist()], dtype=torch.int64)

    def preview(self, isolated: PartitionSketch, *, near: int | None) -> Preview:
        """Count at the edges of a first grid of any budget, all entries and the isolated ones apart.

        isolated  the sketch of the entries isolated now
        near      code of tau around which the grid is fine, as that of the last search; None without one

        Raises ValueError for ``per_layer``, whose grid would be one of every layer.
        """
        if self._mapping is None:
            raise ValueError("a preview is of a global selection")
        edges = preview_edges(near, unit=self._unit)
        counts = torch.cat([self._count(edges.unsqueeze(0), sketch) for sketch in (self._sketch, isolated)])
        entries, held = self._exchange.total(counts).long()
        self._preview = Preview(edges, entries, held)
        return self._preview

    def finish(self, budgets: Tensor) -> Thresholds:
        """Narrow the brackets to neighbours, from a preview where there was one: nothing is exchanged twice.

        Raises RuntimeError when the importance holds inf or nan.
        """
        brackets, widths = self._brackets, self._widths
        if self._preview is not None:
            edges = self._preview.edges.int().unsqueeze(0)
            brackets = brackets.narrow(edges, choose(self._preview.entries.unsqueeze(0), budgets))
            bits = (int(brackets.above - brackets.below) // self._unit - 1).bit_length()
            widths = round_widths(bits, most_bits=GLOBAL_ROUND_BITS) if bits else ()
        for width in widths:
            edges = brackets.edges(width, unit=self._unit)
            answers = self._exchange.answers(self._count(edges, self._sketch), budgets)
            brackets = brackets.narrow(edges, answers)
        codes = brackets.above if self._mapping is None else self._mapping.edges(brackets.above)[:, 0]
        tied_mass = int((brackets.count_below - brackets.count_above).sum())
        return Thresholds(codes, int(budgets.sum()), tied_mass, self.extremes, brackets.above)

    def _count(self, edges: Tensor, sketch: PartitionSketch) -> Tensor:
        """Return this rank's entries at or above edges: [rows, edges] -> the same shape, of `count_dtype`."""
        if self._mapping is None:
            return sketch.counts(edges, dtype=count_dtype(max(self._layer_numel)))
        counts = sketch.counts(self._mapping.edges(edges[0].long()))
        return counts.sum(dim=0, keepdim=True, dtype=count_dtype(sum(self._layer_numel)))


def preview_edges(near: int | None, *, unit: int = 1) -> Tensor:
    """Return the grid of a preview: two edges in every binade, and 512 that are 2^-9 binades apart around ``near``.

    [num_edges] int64, never falling, multiples of ``unit``, the last one `TOP_CODE`.
    """
    coarse = torch.arange(1, 513, dtype=torch.int64) * (1 << _COARSE_BITS)
    if near is None:
        return coarse.clamp(max=TOP_CODE)
    step = max(1 << _FINE_BITS, unit)
    # Another selection may have left a code off this one's lattice.
    fine = near // unit * unit + torch.arange(-256, 256, dtype=torch.int64) * step
    return torch.cat([coarse, fine.clamp(min=unit)]).clamp(max=TOP_CODE).sort().values


def find_thresholds(
    sketch: PartitionSketch,
    exchange: Exchange,
    *,
    ratio: float,
    layer_numel: tuple[int, ...],
    selection: Selection,
    normalizer: Normalizer,
    code_shift: int = 0,
) -> Thresholds:
    """Find the thresholds that isolate at most ``ratio`` of all entries. Collective: every rank must call.

    Exchanges: 5 (min-max), 6 (mean), 5 (raw_global) and 4 (per_layer), whatever the number of layers; 3 for raw_global
    and per_layer from ``code_shift`` 13 and 9 on. One is two collectives where owners answer.

    Raises RuntimeError when the importance holds inf or nan.
    """
    search = ThresholdSearch(
        sketch, exchange, layer_numel=layer_numel, selection=selection, normalizer=normalizer, code_shift=code_shift
    )
    return search.finish(search.budgets(ratio))


def _raw_mapping(num_layers: int) -> _Mapping:
    zeros = torch.zeros(num_layers, dtype=torch.float64)
    return _Mapping(zeros, zeros + 1.0, torch.ones(num_layers, dtype=torch.int64))


def _normalizing_mapping(
    sketch: PartitionSketch,
    exchange: Exchange,
    extremes: Extremes,
    *,
    normalizer: Normalizer,
    layer_numel: tuple[int, ...],
) -> _Mapping:
    max_codes, min_codes, _ = extremes
    never = torch.full_like(max_codes, TOP_CODE)
    # An empty layer (a parameter of no entries) has no extremes; it is flat, so any finite stand-in will do.
    flat = max_codes == min_codes
    low, high = decode(min_codes.clamp(min=0)), decode(max_codes.clamp(min=0))
    if normalizer is Normalizer.MINMAX:
        # fp64 may round min + tau * range down to min for a tiny tau; the clamp keeps normalised zeros plastic.
        return _Mapping(low, high - low, torch.where(flat, never, min_codes + 1))
    limbs = exchange.total(sketch.fixed_point_sums(max_codes))
    means = [
        _exact_mean(int(limbs[0, layer]), int(limbs[1, layer]), numel, int(max_codes[layer]))
        for layer, numel in enumerate(layer_numel)
    ]
    zeros = torch.zeros_like(low)
    scale = torch.tensor(means, dtype=torch.float64)
    return _Mapping(zeros, scale, torch.where(flat, never, torch.ones_like(never)))


def _exact_mean(high: int, low: int, numel: int, max_code: int) -> float:
    """Undo the fixed point of `PartitionSketch.fixed_point_sums`; Python's int / int rounds correctly."""
    if numel == 0:
        return 0.0
    exponent = max(1, max_code >> 23)
    return math.ldexp(((high << LOW_BITS) + low) / numel, exponent - 126 - (FRACTION_BITS + 1))
