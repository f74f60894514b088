"""``policy: inverted``: the least important entries are isolated. What shows whether importance is of any use at all.

[Note: mirror] Codes of importance are mirrored: the smallest positive one becomes the largest finite one and the other
way round, and zero stays zero. The mirror is exact, so what is isolated depends on partitioning as little as before,
and every rule of selection holds: never more than asked, equal entries together or not at all, zeros never. A lattice
of codes is mirrored onto itself.

A normaliser has to act before the mirror. Under ``normalized_global`` an entry is first scored ``(S - minimum) /
scale`` of its layer, in fp64, from extremes and sums of all ranks. Scores reach further down than fp32 does, so they
are multiplied by 2^80: what lies more than 2^206 below its layer's scale counts as equal. An entry with a score of
zero, under min-max one that equals its layer's minimum, is never isolated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epi_ds.choices import Selection
from epi_ds.config import EPIConfig
from epi_ds.isolation.importance.codes import TOP_CODE, codes_of
from epi_ds.isolation.importance.views import Importance
from epi_ds.isolation.layout import Layout, Segment
from epi_ds.isolation.policies.base import Refreshing
from epi_ds.isolation.search.exchange import Exchange
from epi_ds.isolation.search.sketch import read_extremes
from epi_ds.isolation.search.sketches import sketch_of
from epi_ds.isolation.search.tau_map import TauMap, normalizing_map

_SCORE_UNIT = 2.0**80
_SMALLEST_NORMAL = 2.0**-126


class Inverted(Refreshing):
    """Measure and select as ``evolving`` does; what is selected is the mirror's business. See [Note: mirror]."""


def mirrored(values: Tensor) -> Tensor:
    """Return fp32 values in the opposite order, zeros left where they are. See [Note: mirror].

    values  [numel] fp32, finite, not negative; untouched
    """
    codes = codes_of(values)
    return torch.where(codes > 0, TOP_CODE - codes, 0).view(torch.float32)


class LeastImportant:
    """Importance mirrored, after a normaliser where there is one."""

    def __init__(self, importance: Importance, mapping: TauMap | None) -> None:
        """``mapping`` is the normaliser's of every layer; None mirrors importance as it is."""
        self._importance, self._mapping = importance, mapping
        self.code_shift = importance.code_shift if mapping is None else 0

    def read(self, segment: Segment, start: int, stop: int) -> Tensor:
        """See `Importance.read`."""
        values = self._importance.read(segment, start, stop)
        if self._mapping is None:
            return mirrored(values)
        minimum, scale = (float(column[segment.layer]) for column in self._mapping[:2])
        above = values.double() - minimum
        if scale == 0.0:
            # All entries of the layer are equal, so it has none that is less important.
            return torch.zeros_like(values)
        scores = (above * (_SCORE_UNIT / scale)).clamp_(_SMALLEST_NORMAL, torch.finfo(torch.float32).max)
        return torch.where(above > 0, mirrored(scores.float()), 0.0)


def least_important(importance: Importance, layout: Layout, *, config: EPIConfig, exchange: Exchange) -> LeastImportant:
    """Return importance mirrored, as ``selection`` compares it. Collective under ``normalized_global``."""
    if config.selection is not Selection.NORMALIZED_GLOBAL:
        return LeastImportant(importance, None)
    sketch = sketch_of(importance, layout)
    extremes = read_extremes(exchange.maximum(sketch.extremes()))
    mapping = normalizing_map(sketch, exchange, extremes, normalizer=config.normalizer, layer_numel=layout.layer_numel)
    return LeastImportant(importance, mapping)
