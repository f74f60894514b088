"""What a normaliser does to importance, seen from the threshold: the map from tau to a layer's own codes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from epi_ds.choices import Normalizer
from epi_ds.isolation.importance.codes import TOP_CODE, ceil_code, decode
from epi_ds.isolation.search.exchange import Exchange
from epi_ds.isolation.search.sketch import FRACTION_BITS, LOW_BITS, Extremes, Sketch


class TauMap(NamedTuple):
    """The affine map from tau to a layer's importance, ``y = minimum + tau * scale``, as fp64 ``[num_layers]``."""

    minimum: Tensor
    scale: Tensor
    lowest_code: Tensor
    """[num_layers] int64: below it nothing is isolated; `TOP_CODE` where a layer can never isolate."""

    def edges(self, tau_codes: Tensor) -> Tensor:
        """Return ``T_l(tau)``: [num_layers, num_taus] int64, never falling along the second dimension.

        tau_codes  [rows, num_taus] int64: every row is of equally many layers, one after another
        """
        tau = decode(tau_codes)
        values = tau.repeat_interleave(len(self.scale) // len(tau), dim=0)
        values = self.minimum.unsqueeze(1) + values.mul_(self.scale.unsqueeze(1))
        return torch.maximum(ceil_code(values), self.lowest_code.unsqueeze(1))


def raw_map(num_layers: int) -> TauMap:
    """Return the identity."""
    zeros = torch.zeros(num_layers, dtype=torch.float64)
    return TauMap(zeros, zeros + 1.0, torch.ones(num_layers, dtype=torch.int64))


def normalizing_map(
    sketch: Sketch,
    exchange: Exchange,
    extremes: Extremes,
    *,
    normalizer: Normalizer,
    layer_numel: tuple[int, ...],
) -> TauMap:
    """Return the inverse of a normaliser, of a sketch with ``extremes`` over all ranks. Collective for the mean."""
    max_codes, min_codes, _ = extremes
    never = torch.full_like(max_codes, TOP_CODE)
    # An empty layer (a parameter of no entries) has no extremes; it is flat, so any finite stand-in will do.
    flat = max_codes == min_codes
    low, high = decode(min_codes.clamp(min=0)), decode(max_codes.clamp(min=0))
    if normalizer is Normalizer.MINMAX:
        # fp64 may round min + tau * range down to min for a tiny tau; the clamp keeps normalised zeros plastic.
        return TauMap(low, high - low, torch.where(flat, never, min_codes + 1))
    limbs = exchange.total(sketch.fixed_point_sums(max_codes))
    means = [
        _exact_mean(int(limbs[0, layer]), int(limbs[1, layer]), numel, int(max_codes[layer]))
        for layer, numel in enumerate(layer_numel)
    ]
    zeros = torch.zeros_like(low)
    scale = torch.tensor(means, dtype=torch.float64)
    return TauMap(zeros, scale, torch.where(flat, never, torch.ones_like(never)))


def _exact_mean(high: int, low: int, numel: int, max_code: int) -> float:
    """Undo the fixed point of `PartitionSketch.fixed_point_sums`; Python's int / int rounds correctly."""
    if numel == 0:
        return 0.0
    exponent = max(1, max_code >> 23)
    return math.ldexp(((high << LOW_BITS) + low) / numel, exponent - 126 - (FRACTION_BITS + 1))
