"""``policy: momentum``: MoFO (arXiv 2407.20999). In every tensor only the entries with the largest momenta move.

[Note: late] MoFO filters the update of step t by the momenta that include the gradient of step t. Here the mask of step
t + 1 is selected from the momenta after step t: a mask is fixed before its step's first backward (see [Note: when] in
controller.py), so it is one step late, and the first step moves everything. ``ratio`` is the share that stands still;
the paper moves 5 to 20 %, which are ratios of 0.8 to 0.95.

[Note: still entries] Entries without a momentum are the first to stand still, unlike entries without importance, which
are never isolated: where most of an embedding has no gradient, the rest of it would otherwise stand still instead. They
are equal, so where they alone are more than ``ratio`` none of the tensor is isolated, and only weight decay moves them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epi_ds.isolation.importance.codes import TOP_CODE, codes_of
from epi_ds.isolation.importance.views import Importance
from epi_ds.isolation.layout import Segment
from epi_ds.isolation.policies.base import Refreshing


class Momentum(Refreshing):
    """Select after every ``refresh_interval`` steps, by default each, from the optimizer's momenta. Keeps no state."""

    def observes(self, step: int) -> bool:
        """Never: the optimizer measures."""
        return False


class SmallestMomenta:
    """Momenta mirrored: the smallest first. See [Note: mirror] in inverted.py, and [Note: still entries]."""

    code_shift = 0
    """See `Importance.code_shift`: momenta are of all codes."""

    def __init__(self, magnitudes: Importance) -> None:
        """``magnitudes`` reads the absolute momenta."""
        self._magnitudes = magnitudes

    def read(self, segment: Segment, start: int, stop: int) -> Tensor:
        """See `Importance.read`."""
        codes = codes_of(self._magnitudes.read(segment, start, stop))
        return (TOP_CODE - codes).clamp_(max=TOP_CODE - 1).view(torch.float32)
