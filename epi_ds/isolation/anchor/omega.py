"""Which entries an anchor pulls more than others (``weight: importance``): what is remembered, over its mean.

[Note: omega] Under ``pull: gradient`` omega is S over its mean, as in the quadratic penalty of EWC (arXiv 1612.00796),
under ``pull: update`` it is the root of S over the mean of the roots: in a decoupled pull S itself leaves too much
behind, as few entries hold most of it. S is the largest, entry by entry, of what is remembered of finished stages, each
over its own mean. The means are over all covered entries, from integer sums, so they do not depend on the ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epi_ds.choices import Pull
from epi_ds.isolation.importance.mean import exact_mean
from epi_ds.isolation.importance.views import Importance
from epi_ds.isolation.layout import Layout, Segment
from epi_ds.isolation.search.exchange import Exchange


class Rooted:
    """The roots of an importance."""

    code_shift = 0
    """See `Importance.code_shift`: roots are of all codes."""

    def __init__(self, importance: Importance) -> None:
        self._importance = importance

    def read(self, segment: Segment, start: int, stop: int) -> Tensor:
        """See `Importance.read`."""
        return self._importance.read(segment, start, stop).sqrt()


class Omega:
    """How much every covered entry is pulled, relative to their mean. See [Note: omega]."""

    def __init__(self, remembered: Importance, pull: Pull, *, layout: Layout, exchange: Exchange) -> None:
        """Collective. ``remembered`` is read whenever omega is, and takes no further room."""
        self._importance = Rooted(remembered) if pull is Pull.UPDATE else remembered
        mean = exact_mean(self._importance, layout, exchange)
        # Where nothing mattered, nothing is pulled.
        self._factor = 1.0 / mean if mean else 0.0

    def read(self, segment: Segment, start: int, stop: int) -> Tensor:
        """Return omega of entries ``[start, stop)`` of a segment: fp32, on the home device; new."""
        values = self._importance.read(segment, start, stop).double() * self._factor
        return values.clamp_(max=torch.finfo(torch.float32).max).float()
