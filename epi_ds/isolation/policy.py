"""Who decides when importance is measured and when a mask is selected.

A policy answers two questions about an applied step; what it measures and how a mask is selected from it are
the controller's. Controls that select differently (random, inverted) belong here too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from epi_ds.choices import PolicyName
from epi_ds.config import EPIConfig
from epi_ds.isolation.schedule import refresh_due


class Policy(Protocol):
    """The two decisions of a policy. ``step`` is the number of the applied step, from 1."""

    def observes(self, step: int) -> bool:
        """Whether the gradient of this step enters the importance."""

    def refreshes(self, step: int) -> bool:
        """Whether a new mask is selected after this step."""


@dataclass(frozen=True)
class Evolving:
    """Measure always, select every ``refresh_interval`` steps (EPI, arXiv 2604.14010)."""

    refresh_interval: int
    warmup_steps: int = 0

    def observes(self, step: int) -> bool:
        """Always: isolated entries keep being measured, otherwise a mask would undo itself."""
        return True

    def refreshes(self, step: int) -> bool:
        """Every ``refresh_interval`` steps, from ``warmup_steps`` on."""
        return refresh_due(step, self.refresh_interval, warmup_steps=self.warmup_steps)


@dataclass(frozen=True)
class Static:
    """Keep the one mask that a probe or a file gave."""

    def observes(self, step: int) -> bool:
        """Never: the mask does not depend on the run."""
        return False

    def refreshes(self, step: int) -> bool:
        """Never."""
        return False


def make_policy(config: EPIConfig) -> Policy:
    """Return the policy that ``config`` names. ``none`` is static with no mask."""
    if config.policy is PolicyName.EVOLVING:
        return Evolving(config.selection_interval, config.warmup_steps)
    return Static()
