"""``policy: first``: the first mask that is selected is kept for good. What a mask that evolves is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from epi_ds.isolation.policies.base import Policy


@dataclass(frozen=True)
class First(Policy):
    """Measure until the first mask, as ``evolving`` does, and keep that one: static isolation (arXiv 2604.14010) by the
    importance of the run's own beginning.
    """

    last_measured_step: int
    """The step after which the mask is selected."""

    def observes(self, step: int) -> bool:
        """Until the mask is selected; its importance is then freed."""
        return step <= self.last_measured_step

    def refreshes(self, step: int) -> bool:
        """Once."""
        return step == self.last_measured_step
