"""What a policy decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from epi_ds.isolation.importance.views import Importance
from epi_ds.isolation.placement import Placement
from epi_ds.isolation.schedule import refresh_due


class Policy(Protocol):
    """The decisions of a policy. ``step`` is the number of the applied step, from 1.

    What does not say otherwise selects by importance, and neither before the first step nor at the end of a stage.
    """

    def observes(self, step: int) -> bool:
        """Whether the gradient of this step enters the importance."""

    def refreshes(self, step: int) -> bool:
        """Whether a new mask is selected after this step."""

    @property
    def selects_at_start(self) -> bool:
        """Whether a mask is selected before the first step, from no importance."""
        return False

    @property
    def selects_at_stage_ends(self) -> bool:
        """Whether a new mask is selected when a stage ends, whatever ``memory`` says."""
        return False

    def ranking(self, placement: Placement, *, draw: int) -> Importance | None:
        """Return what entries are ranked by instead of importance, largest first; None ranks by importance.

        draw  number of the selection, from 0: the refreshes so far
        """
        return None


@dataclass(frozen=True)
class Refreshing(Policy):
    """Measure always, select every ``refresh_interval`` steps, from ``warmup_steps`` on."""

    refresh_interval: int
    warmup_steps: int = 0

    def observes(self, step: int) -> bool:
        """Always: isolated entries keep being measured, otherwise a mask would undo itself."""
        return True

    def refreshes(self, step: int) -> bool:
        """Every ``refresh_interval`` steps, from ``warmup_steps`` on."""
        return refresh_due(step, self.refresh_interval, warmup_steps=self.warmup_steps)
