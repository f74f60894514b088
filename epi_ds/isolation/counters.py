"""What has happened so far in a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Counters:
    """The same on every rank; saved with a checkpoint."""

    applied_steps: int = 0
    observations: int = 0
    """Gradients that have entered the importance."""
    importance_weight: float = 0.0
    """Total weight of the squared gradients in the importance: 1 - ema_decay^t after t steps, 1 after a probe."""
    active_steps: int = 0
    """Applied steps that ran under a mask with at least one isolated entry."""
    refreshes: int = 0
    finished_stages: int = 0
    held_gradient_energy: float = 0.0
    """Sum since the last refresh, over the steps under a mask, of the share of |g|^2 that was held."""
    held_steps: int = 0
    """The number of those steps."""
    held_step_energy: float = 0.0
    """Sum since the last refresh of the share of |update|^2 that was held, under ``apply: update``."""
    measured_steps: int = 0
    """The number of steps in that sum."""

    @property
    def mean_held_gradient_energy(self) -> float | None:
        """See `RefreshReport.held_gradient_energy`."""
        return self.held_gradient_energy / self.held_steps if self.held_steps else None

    @property
    def mean_held_step_energy(self) -> float | None:
        """See `RefreshReport.held_step_energy`."""
        return self.held_step_energy / self.measured_steps if self.measured_steps else None

    def after_refresh(self) -> Counters:
        """Return the counters with which the next window begins."""
        return replace(
            self,
            refreshes=self.refreshes + 1,
            held_gradient_energy=0.0,
            held_steps=0,
            held_step_energy=0.0,
            measured_steps=0,
        )

    def to_dict(self) -> dict[str, int | float]:
        """Return what `from_dict` takes; JSON keeps every bit of it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Counters:
        """Return saved counters."""
        return cls(**saved)
