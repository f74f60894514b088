"""The size of a gradient's entries, which ``pull: gradient`` is in proportion to. See [Note: strength]."""

from __future__ import annotations

import math
from dataclasses import dataclass

DECAY = 0.9
"""Weight of what was seen before, as in Adam's first moment: one large gradient does not decide a pull."""


@dataclass(frozen=True)
class GradientScale:
    """Average of the mean squared gradient over applied steps, corrected for its start at zero."""

    square_sum: float = 0.0
    weight: float = 0.0
    """Total weight of what was seen, 1 - DECAY^steps."""

    def after(self, norm: float, num_entries: int) -> GradientScale:
        """Return the average with one more step in it.

        norm         of the clipped gradient, over the entries that move; agreed by all ranks
        num_entries  that move, over all ranks; 0 where everything is isolated
        """
        square = norm * norm / num_entries if num_entries else 0.0
        return GradientScale(DECAY * self.square_sum + (1 - DECAY) * square, DECAY * self.weight + (1 - DECAY))

    @property
    def rms(self) -> float:
        """Root of the average; 0 before the first step."""
        return math.sqrt(self.square_sum / self.weight) if self.weight else 0.0
