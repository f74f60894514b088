"""``policy: random``: a mask that knows nothing of importance. What any rule of selection is compared with.

[Note: draws] The rank of an entry is a hash of (seed, number of the draw, parameter, index in the flattened parameter),
so a draw is the same at every number of ranks and has no state beside the counter of refreshes, which is saved. It is
read as a code of importance, between 1 and the largest finite one, and thresholds are searched as for any other: the
mask holds the largest ranks. Of 2^31 codes some fall together, and equal entries are isolated together or not at all,
so that a draw of N entries may leave about N / 2^31 of its budget unused; it never exceeds it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epi_ds.choices import Redraw
from epi_ds.isolation.importance.stored import dither_key
from epi_ds.isolation.importance.views import Importance
from epi_ds.isolation.layout import Segment
from epi_ds.isolation.placement import Placement
from epi_ds.isolation.policies.base import Policy
from epi_ds.isolation.schedule import refresh_due
from epi_ds.kernels import random_codes


class RandomRanks:
    """One draw, read as importance. See [Note: draws]."""

    code_shift = 0
    """See `Importance.code_shift`: ranks are of all codes."""

    def __init__(self, placement: Placement, *, seed: int, draw: int) -> None:
        self._placement = placement
        self._name = f"{seed}/random/{draw}"

    def read(self, segment: Segment, start: int, stop: int) -> Tensor:
        """See `Importance.read`."""
        key, device = dither_key(f"{self._name}/{segment.name}"), self._placement.home_of(segment)
        return random_codes(key, segment.global_start + start, stop - start, device=device).view(torch.float32)


@dataclass(frozen=True)
class Random(Policy):
    """Draw a mask before the first step, and new ones as ``redraw`` says. Measures nothing and keeps no state."""

    seed: int
    redraw: Redraw
    refresh_interval: int
    warmup_steps: int = 0

    def observes(self, step: int) -> bool:
        """Never."""
        return False

    def refreshes(self, step: int) -> bool:
        """After ``warmup_steps``, if there are any, and with ``redraw: refresh`` every ``refresh_interval`` steps."""
        due = self.redraw is Redraw.REFRESH and refresh_due(step, self.refresh_interval, warmup_steps=self.warmup_steps)
        return due or step == self.warmup_steps

    @property
    def selects_at_start(self) -> bool:
        """Unless there are ``warmup_steps``."""
        return self.warmup_steps == 0

    @property
    def selects_at_stage_ends(self) -> bool:
        """With ``redraw: stage``."""
        return self.redraw is Redraw.STAGE

    def ranking(self, placement: Placement, *, draw: int) -> Importance:
        """Return a draw. See [Note: draws]."""
        return RandomRanks(placement, seed=self.seed, draw=draw)
