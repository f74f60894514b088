"""Which entries an anchor pulls more than others (``weight: importance``): what is remembered, over its mean.

[Note: omega] Under ``pull: gradient`` omega is S over its mean, as in the quadratic penalty of EWC (arXiv 1612.00796),
under ``pull: update`` it is the root of S over the mean of the roots: in a decoupled pull S itself leaves too much
behind, as few entries hold most of it. S is the largest, entry by entry, of what is remembered of finished stages, each
over its own mean. The means are over all covered entries, from integer sums, so they do not depend on the ranks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from epi_ds.choices import Pull
from epi_ds.isolation.importance.mean import Divided, exact_mean
from epi_ds.isolation.importance.views import Importance
from epi_ds.isolation.layout import Layout, Segment
from epi_ds.isolation.search.exchange import Exchange


class Rooted:
    """The roots of an importance."""

    code_shift = 0
    """See `Importance.code_shift`: roots are of all codes."""

    def __init__(self, importance: Importance) -> None:
        self.importance = importance

    def of(self, values: Tensor) -> Tensor:
        """Return what is read where the importance has these values; new."""
        if values.device.type != "cpu":
            return values.sqrt()
        # The same bits as torch's, which takes ten times as long where some are zero, and has no root of a denormal.
        with np.errstate(invalid="ignore"):
            return torch.from_numpy(np.sqrt(values.numpy()))

    def read(self, segment: Segment, start: int, stop: int) -> Tensor:
        """See `Importance.read`."""
        return self.of(self.importance.read(segment, start, stop))


def omega_of(remembered: Importance, pull: Pull, *, layout: Layout, exchange: Exchange) -> Divided:
    """Return how much every covered entry is pulled, relative to their mean. Collective. See [Note: omega].

    ``remembered`` is read whenever the result is, and takes no further room. Where nothing mattered, it is zero.
    """
    pulled: Importance = Rooted(remembered) if pull is Pull.UPDATE else remembered
    return Divided(pulled, exact_mean(pulled, layout, exchange))
