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
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from epi_ds.config import Normalizer, Selection
from epi_ds.isolation.bracket import Answers, Brackets, count_dtype, round_widths
from epi_ds.isolation.importance import TOP_CODE, ceil_code, decode
from epi_ds.isolation.sketch import FRACTION_BITS, LOW_BITS, Extremes, PartitionSketch, read_extremes

CODE_BITS = 31
# See [Note: rounds].
GLOBAL_ROUND_BITS = 9
LAYER_ROUND_BITS = 11


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

    code_shift  the state's codes are multiples of ``1 << code_shift``: 0 for fp32, 16 for bf16

    Raises RuntimeError when the importance holds inf or nan.
    """
    # Only the normalisers compute with them; the report of a refresh wants them for every selection.
    extremes = read_extremes(exchange.maximum(sketch.extremes()))
    totals = torch.tensor(layer_numel, dtype=torch.int64)
    widths = search_widths(selection, code_shift=code_shift)
    unit = 1 << code_shift
    if selection is Selection.PER_LAYER:
        budgets = torch.tensor([budget_of(ratio, numel) for numel in layer_numel], dtype=torch.int64)
        layer_dtype = count_dtype(max(layer_numel))
        found = _search(
            lambda edges: sketch.counts(edges, dtype=layer_dtype),
            exchange,
            totals=totals,
            budgets=budgets,
            widths=widths,
            unit=unit,
        )
        return Thresholds(found.above, int(budgets.sum()), _tied_mass(found), extremes)
    if selection is Selection.RAW_GLOBAL:
        mapping = _raw_mapping(len(layer_numel))
    else:
        unit = 1
        mapping = _normalizing_mapping(sketch, exchange, extremes, normalizer=normalizer, layer_numel=layer_numel)
    budget = budget_of(ratio, sum(layer_numel))
    sum_dtype = count_dtype(sum(layer_numel))
    found = _search(
        lambda taus: sketch.counts(mapping.edges(taus[0].long())).sum(dim=0, keepdim=True, dtype=sum_dtype),
        exchange,
        totals=totals.sum(dim=0, keepdim=True),
        budgets=torch.tensor([budget]),
        widths=widths,
        unit=unit,
    )
    return Thresholds(mapping.edges(found.above)[:, 0], budget, _tied_mass(found), extremes)


def _search(
    count: Callable[[Tensor], Tensor],
    exchange: Exchange,
    *,
    totals: Tensor,
    budgets: Tensor,
    widths: Sequence[int],
    unit: int,
) -> Brackets:
    """Narrow the brackets of all rows to neighbours. See [Note: brackets].

    count    this rank's entries at or above edges: [rows, edges] int32 -> the same shape, of `count_dtype`
    totals   [rows] int64: entries of every row over all ranks
    budgets  [rows] int64
    """
    brackets = Brackets.whole(totals, top=TOP_CODE)
    for width in widths:
        edges = brackets.edges(width, unit=unit)
        found = exchange.answers(count(edges), budgets)
        brackets = brackets.narrow(edges, found)
    return brackets


def _tied_mass(found: Brackets) -> int:
    return int((found.count_below - found.count_above).sum())


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
