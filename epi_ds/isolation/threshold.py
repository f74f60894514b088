"""The search for thresholds: from merged sketches to one integer code per layer.

[Note: search] ``normalized_global`` and ``raw_global`` look for tau, the smallest positive fp32 number with
``sum over layers of count(code >= T_l(tau)) <= budget``, by three rounds over the 31 bits of tau's own pattern
(11 + 10 + 10). All layers share one grid of candidate taus; every rank counts its entries against the exact edges
``T_l(tau_j)``, and the counts are summed over the layers *before* they travel: one vector of at most 2048 integers a
round, whatever the number of layers. fp64 multiplication and addition by non-negative numbers, `ceil_code`, max and
min are monotone, so counts never rise with tau and a true count at every grid point brackets tau exactly.
``per_layer`` searches the codes of each layer in the same three rounds, with one bracket per layer.

Ties are not broken: a threshold never isolates more than its budget, and the next smaller one would.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from epi_ds.config import Normalizer, Selection
from epi_ds.isolation.importance import TOP_CODE, ceil_code, decode
from epi_ds.isolation.sketch import EMPTY, FRACTION_BITS, LOW_BITS, PartitionSketch

# Rounds of the search: the step between candidates. Candidates per round: 2040 (per layer: 2048), 1024, 1024.
_TAU_STEPS = (1 << 20, 1 << 10, 1)
_GRID_WIDTHS = (2048, 1024, 1024)


class Exchange(Protocol):
    """Merges integer tensors over all ranks. Every rank gets the same bits."""

    def maximum(self, values: Tensor) -> Tensor:
        """Element-wise maximum over the ranks."""

    def total(self, values: Tensor) -> Tensor:
        """Element-wise sum over the ranks."""


class Thresholds(NamedTuple):
    """What a search found. The same on every rank, bit for bit."""

    codes: Tensor
    """[num_layers] int64 on the CPU: an entry is isolated when its code is at or above its layer's."""
    budget: int
    """Most entries that may be isolated: the ratio times the covered entries, floored in decimal arithmetic."""
    max_codes: Tensor | None
    """[num_layers] int64: largest code of each layer, where the normaliser needed it."""


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


def find_thresholds(
    sketch: PartitionSketch,
    exchange: Exchange,
    *,
    ratio: float,
    layer_numel: tuple[int, ...],
    selection: Selection,
    normalizer: Normalizer,
) -> Thresholds:
    """Find the thresholds that isolate at most ``ratio`` of all entries. Collective: every rank must call.

    Exchanges: 4 (min-max), 5 (mean), 3 (raw_global and per_layer), whatever the number of layers.
    """
    if selection is Selection.PER_LAYER:
        budgets = torch.tensor([budget_of(ratio, numel) for numel in layer_numel])
        codes = _search_per_layer(sketch, exchange, budgets)
        return Thresholds(codes, int(budgets.sum()), None)
    max_codes = None
    if selection is Selection.RAW_GLOBAL:
        mapping = _raw_mapping(len(layer_numel))
    else:
        mapping, max_codes = _normalizing_mapping(sketch, exchange, normalizer, layer_numel)
    budget = budget_of(ratio, sum(layer_numel))
    return Thresholds(_search_tau(sketch, exchange, mapping, budget), budget, max_codes)


def _raw_mapping(num_layers: int) -> _Mapping:
    zeros = torch.zeros(num_layers, dtype=torch.float64)
    return _Mapping(zeros, zeros + 1.0, torch.ones(num_layers, dtype=torch.int64))


def _normalizing_mapping(
    sketch: PartitionSketch, exchange: Exchange, normalizer: Normalizer, layer_numel: tuple[int, ...]
) -> tuple[_Mapping, Tensor]:
    extremes = exchange.maximum(sketch.extremes())
    max_codes, min_codes = extremes[0], -extremes[1]
    never = torch.full_like(max_codes, TOP_CODE)
    flat = (max_codes == EMPTY) | (max_codes == min_codes)
    # An empty layer (a parameter of no entries) has no extremes; it is `flat`, so any finite stand-in will do.
    low, high = decode(min_codes.clamp(0, TOP_CODE)), decode(max_codes.clamp(min=0))
    if normalizer is Normalizer.MINMAX:
        # fp64 may round min + tau * range down to min for a tiny tau; the clamp keeps normalised zeros plastic.
        return _Mapping(low, high - low, torch.where(flat, never, min_codes + 1)), max_codes
    limbs = exchange.total(sketch.fixed_point_sums(max_codes))
    means = [
        _exact_mean(int(limbs[0, layer]), int(limbs[1, layer]), numel, int(max_codes[layer]))
        for layer, numel in enumerate(layer_numel)
    ]
    zeros = torch.zeros_like(low)
    scale = torch.tensor(means, dtype=torch.float64)
    return _Mapping(zeros, scale, torch.where(flat, never, torch.ones_like(never))), max_codes


def _exact_mean(high: int, low: int, numel: int, max_code: int) -> float:
    """Undo the fixed point of `PartitionSketch.fixed_point_sums`; Python's int / int rounds correctly."""
    if numel == 0:
        return 0.0
    exponent = max(1, max_code >> 23)
    return math.ldexp(((high << LOW_BITS) + low) / numel, exponent - 126 - (FRACTION_BITS + 1))


def _search_tau(sketch: PartitionSketch, exchange: Exchange, mapping: _Mapping, budget: int) -> Tensor:
    """Return ``T_l(tau)`` for the smallest tau within ``budget``. See [Note: search]."""
    below, above = 0, TOP_CODE  # count(below) > budget or below == 0; count(above) == 0 <= budget
    for step in _TAU_STEPS:
        taus = torch.arange(below + step, above + step, step, dtype=torch.int64).clamp_(max=above)
        counts = exchange.total(sketch.counts(mapping.edges(taus)).sum(dim=0))
        first = int(torch.nonzero(counts <= budget)[0])
        above = int(taus[first])
        below = int(taus[first - 1]) if first else below
    return mapping.edges(torch.tensor([above]))[:, 0]


def _search_per_layer(sketch: PartitionSketch, exchange: Exchange, budgets: Tensor) -> Tensor:
    """Return, per layer, the smallest positive code with at most its budget of entries at or above it."""
    below = torch.zeros_like(budgets)
    above = torch.full_like(budgets, TOP_CODE)
    for width in _GRID_WIDTHS:
        step = -((below - above) // width).unsqueeze(1)
        grid = below.unsqueeze(1) + step * torch.arange(1, width + 1)
        edges = torch.minimum(grid, above.unsqueeze(1))
        counts = exchange.total(sketch.counts(edges))
        # counts never rise along an edge row, and the last edge is always within budget.
        first = (counts > budgets.unsqueeze(1)).sum(dim=1)
        rows = torch.arange(budgets.numel())
        below = torch.where(first > 0, edges[rows, (first - 1).clamp(min=0)], below)
        above = edges[rows, first]
    return above
