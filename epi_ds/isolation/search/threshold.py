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

[Note: previews] A search may begin with a grid that serves any budget: some edges in every binade, and edges 2^-9
binades apart around the last threshold. The counts at them say how far masks have drifted and what share of the
importance a budget holds; the search goes on from it, in at most two rounds, and exchanges nothing twice.

Ties are not broken: a threshold never isolates more than its budget, and the next smaller one would.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from epi_ds.choices import Normalizer, Selection
from epi_ds.isolation.importance.codes import TOP_CODE, decode
from epi_ds.isolation.search.bracket import Brackets, choose, count_dtype, round_widths
from epi_ds.isolation.search.exchange import Exchange
from epi_ds.isolation.search.sketch import Extremes, Sketch, read_extremes
from epi_ds.isolation.search.tau_map import TauMap, normalizing_map, raw_map

CODE_BITS = 31
# See [Note: rounds].
GLOBAL_ROUND_BITS = 9
LAYER_ROUND_BITS = 11

# Distances between the edges of a preview, in codes: half a binade, a quarter of one for every layer, and 2^-9 of one.
# See [Note: previews]. A threshold between two quarters takes 2048 and 1024 more edges of every layer: with 1000 layers
# 12 MB, and the preview 6.
_GLOBAL_COARSE_BITS = 22
_LAYER_COARSE_BITS = 21
_FINE_BITS = 14
# Edges around the last threshold: of one grid for all layers, and of one for every layer.
_GLOBAL_FINE_EDGES = 512
_LAYER_FINE_EDGES = 128
# Quarter binades below a layer's maximum; what is smaller than 2^-64 of it holds no share of its importance.
_LAYER_COARSE_EDGES = 256

# Rounds of a `Scale`: 14 bits of a threshold, which is 1/64 binade.
_SCALE_WIDTHS = (128, 128)


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


class Scale(NamedTuple):
    """``(value - minimum) * factor`` is 1 about where a threshold lies. All ``[num_layers]`` fp64 on the CPU."""

    minimum: Tensor
    factor: Tensor
    """Not negative; 0 where a layer can never isolate."""


def budget_of(ratio: float, numel: int) -> int:
    """Return ``floor(ratio * numel)`` in decimal arithmetic; in binary, floor(0.29 * 100) is 28."""
    return math.floor(Fraction(str(ratio)) * numel)


def search_widths(selection: Selection, *, code_shift: int) -> tuple[int, ...]:
    """Return the edges of every round of a search. See [Note: rounds] and [Note: lattice]."""
    if selection is Selection.PER_LAYER:
        return round_widths(CODE_BITS - code_shift, most_bits=LAYER_ROUND_BITS)
    lattice_shift = code_shift if selection is Selection.RAW_GLOBAL else 0
    return round_widths(CODE_BITS - lattice_shift, most_bits=GLOBAL_ROUND_BITS)


class SearchPlan(NamedTuple):
    """What is searched: thresholds of which layers, over which entries, on which lattice."""

    layer_numel: tuple[int, ...]
    """Entries of every layer over all ranks."""
    selection: Selection
    normalizer: Normalizer
    """What makes layers comparable under ``normalized_global``; ignored elsewhere."""
    code_shift: int = 0
    """See `Importance.code_shift`: 0 for fp32, 16 for bf16."""
    tasks: int = 1
    """The layers are those of so many tasks, one task after another, each with a tau of its own."""

    @property
    def row_numel(self) -> Tensor:
        """Entries of every row: of each layer for ``per_layer``, else of each task. [rows] int64 on the CPU."""
        numel = torch.tensor(self.layer_numel, dtype=torch.int64)
        return numel if self.selection is Selection.PER_LAYER else numel.view(self.tasks, -1).sum(dim=1)

    @property
    def unit(self) -> int:
        """Distance of neighbouring codes that may be thresholds; tau of ``normalized_global`` is no entry's code."""
        return 1 if self.selection is Selection.NORMALIZED_GLOBAL else 1 << self.code_shift


class Preview(NamedTuple):
    """Counts of all ranks at the edges of a first grid, before a search has a budget. See [Note: previews].

    All ``[rows, num_edges]`` int64 on the CPU; a row is a layer for ``per_layer``, else there is one.
    """

    edges: Tensor
    """Codes of what is searched, never falling along a row; the first is the smallest positive one."""
    entries: Tensor
    """Entries at or above every edge."""
    isolated: Tensor
    """Those of ``entries`` that are isolated now."""


class ThresholdSearch:
    """One search for thresholds over merged sketches. Collective: every rank must take the same steps."""

    def __init__(
        self,
        sketch: Sketch,
        exchange: Exchange,
        plan: SearchPlan,
        *,
        normalized_by: Sketch | None = None,
        extremes: Extremes | None = None,
    ) -> None:
        """Exchange the extremes of the layers unless they are given, and their sums for the mean.

        normalized_by  whose extremes and sums normalise, where they are not those of ``sketch``
        extremes       of ``normalized_by`` over all ranks
        """
        layer_numel, selection = plan.layer_numel, plan.selection
        self._sketch, self._exchange, self._layer_numel = sketch, exchange, layer_numel
        # Only the normalisers compute with them; the report of a refresh wants them for every selection.
        normalized_by = normalized_by or sketch
        self.extremes = read_extremes(exchange.maximum(normalized_by.extremes())) if extremes is None else extremes
        self._mapping: TauMap | None = None
        if selection is Selection.RAW_GLOBAL:
            self._mapping = raw_map(len(layer_numel))
        elif selection is Selection.NORMALIZED_GLOBAL:
            self._mapping = normalizing_map(
                normalized_by, exchange, self.extremes, normalizer=plan.normalizer, layer_numel=layer_numel
            )
        self._totals, self._unit = plan.row_numel, plan.unit
        self._widths = search_widths(selection, code_shift=plan.code_shift)
        self._brackets = Brackets.whole(self._totals, top=TOP_CODE)
        self._preview: Preview | None = None

    @property
    def num_rows(self) -> int:
        """Thresholds that are searched together: one of each layer for ``per_layer``, else one of each task."""
        return len(self._totals)

    @property
    def numel(self) -> int:
        """Entries over all ranks."""
        return sum(self._layer_numel)

    def budgets(self, ratio: float) -> Tensor:
        """Return what a ratio allows: [num_layers] int64 for ``per_layer``, else [tasks]."""
        return torch.tensor([budget_of(ratio, numel) for numel in self._totals.tolist()], dtype=torch.int64)

    def preview(self, isolated: Sketch | None, *, near: Tensor | None) -> Preview:
        """Count at the edges of a first grid, all entries and the isolated ones apart. See [Note: previews].

        isolated  the sketch of the entries isolated now; None leaves their counts zero
        near      [rows] int64: codes around which the grid is fine, as `Thresholds.row_codes`; None without any
        """
        if self._mapping is None:
            edges = layer_edges(self.extremes.max_codes, near, unit=self._unit)
        else:
            edges = global_edges(near, unit=self._unit)
        sketches = [self._sketch] if isolated is None else [self._sketch, isolated]
        merged = self._exchange.total(torch.cat([self._count(edges, sketch) for sketch in sketches])).long()
        entries, held = merged[: len(edges)], merged[len(edges) :]
        self._preview = Preview(edges, entries, torch.zeros_like(entries) if isolated is None else held)
        return self._preview

    def scale(self, budgets: Tensor) -> Scale:
        """Return where importance lies relative to the thresholds of ``budgets``, to 1/64 binade.

        Raises RuntimeError when the importance holds inf or nan.
        """
        brackets = self._brackets
        for width in _SCALE_WIDTHS:
            brackets = self._narrowed(brackets, width, budgets)
        rows = decode(brackets.above)
        if self._mapping is None:
            return Scale(torch.zeros_like(rows), 1.0 / rows)
        divisor = self._mapping.scale * rows.repeat_interleave(len(self._layer_numel) // len(rows))
        can_isolate = (self._mapping.lowest_code < TOP_CODE) & (divisor > 0)
        return Scale(self._mapping.minimum, torch.where(can_isolate, 1.0 / divisor, 0.0))

    def finish(self, budgets: Tensor) -> Thresholds:
        """Narrow the brackets to neighbours, from a preview where there was one: nothing is exchanged twice.

        Raises RuntimeError when the importance holds inf or nan.
        """
        brackets, widths = self._brackets, self._widths
        if self._preview is not None:
            brackets = brackets.narrow(self._preview.edges.int(), choose(self._preview.entries, budgets))
            bits = (int((brackets.above - brackets.below).max()) // self._unit - 1).bit_length()
            widths = round_widths(bits, most_bits=LAYER_ROUND_BITS) if bits else ()
        for width in widths:
            brackets = self._narrowed(brackets, width, budgets)
        codes = brackets.above if self._mapping is None else self._mapping.edges(brackets.above.unsqueeze(1))[:, 0]
        tied_mass = int((brackets.count_below - brackets.count_above).sum())
        return Thresholds(codes, int(budgets.sum()), tied_mass, self.extremes, brackets.above)

    def _narrowed(self, brackets: Brackets, width: int, budgets: Tensor) -> Brackets:
        """Return the brackets after one round."""
        edges = brackets.edges(width, unit=self._unit)
        return brackets.narrow(edges, self._exchange.answers(self._count(edges, self._sketch), budgets))

    def _count(self, edges: Tensor, sketch: Sketch) -> Tensor:
        """Return this rank's entries at or above edges: [rows, edges] -> the same shape, of `count_dtype`."""
        if self._mapping is None:
            return sketch.counts(edges, dtype=count_dtype(max(self._layer_numel)))
        counts = sketch.counts(self._mapping.edges(edges.long()))
        dtype = count_dtype(int(self._totals.max()))
        return counts.view(len(edges), -1, counts.shape[1]).sum(dim=1, dtype=dtype)


def global_edges(near: Tensor | None, *, unit: int = 1) -> Tensor:
    """Return the grid of a preview over all layers: two edges in every binade. See [Note: previews].

    [1, num_edges] int64, never falling, multiples of ``unit``, the first one ``unit``, the last one `TOP_CODE`.

    near  [1] int64; None without any
    """
    edges = (torch.arange(512, dtype=torch.int64) << _GLOBAL_COARSE_BITS).unsqueeze(0)
    if near is not None:
        edges = torch.cat([edges, _fine_edges(near, _GLOBAL_FINE_EDGES, unit=unit)], dim=1)
    return edges.clamp(min=unit, max=TOP_CODE).sort(dim=1).values


def layer_edges(max_codes: Tensor, near: Tensor | None, *, unit: int = 1) -> Tensor:
    """Return the grids of a preview of every layer: four edges in each of the 64 binades below its maximum.

    [num_layers, num_edges] int64, never falling along a row, multiples of ``unit``, the first one ``unit``, the last
    one above every entry.

    max_codes  [num_layers] int64, -1 for a layer without entries
    near       [num_layers] int64; None without any
    """
    top = ((max_codes.clamp(min=0) >> _LAYER_COARSE_BITS) + 1) << _LAYER_COARSE_BITS
    coarse = top.unsqueeze(1) - (torch.arange(_LAYER_COARSE_EDGES, dtype=torch.int64) << _LAYER_COARSE_BITS)
    # Of a layer with fewer positive entries than its budget the threshold is the smallest code.
    parts = [torch.full_like(top, unit).unsqueeze(1), coarse]
    if near is not None:
        parts.append(_fine_edges(near, _LAYER_FINE_EDGES, unit=unit))
    return torch.cat(parts, dim=1).clamp(min=unit, max=TOP_CODE).sort(dim=1).values


def _fine_edges(near: Tensor, count: int, *, unit: int) -> Tensor:
    """Return ``count`` edges around each code: [len(near), count] int64."""
    step = max(1 << _FINE_BITS, unit)
    # Another selection may have left a code off this one's lattice.
    around = near.unsqueeze(1) // unit * unit
    return around + torch.arange(-count // 2, count // 2, dtype=torch.int64) * step


def find_thresholds(
    sketch: Sketch,
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
    plan = SearchPlan(layer_numel, selection, normalizer, code_shift)
    search = ThresholdSearch(sketch, exchange, plan)
    return search.finish(search.budgets(ratio))
