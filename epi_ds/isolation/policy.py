"""Who decides when importance is measured and when a mask is selected: the paper's policies, and which is asked for.

The others are in policies/. How a mask is selected is the refresh's business.
"""

from __future__ import annotations

from dataclasses import dataclass

from epi_ds.choices import PolicyName
from epi_ds.config import EPIConfig
from epi_ds.isolation.policies.base import Policy, Refreshing
from epi_ds.isolation.policies.first import First
from epi_ds.isolation.policies.half import Half
from epi_ds.isolation.policies.inverted import Inverted
from epi_ds.isolation.policies.momentum import Momentum
from epi_ds.isolation.policies.random import Random
from epi_ds.isolation.schedule import first_active_step


class Evolving(Refreshing):
    """What is important is isolated until the next refresh (EPI, arXiv 2604.14010)."""


@dataclass(frozen=True)
class Static(Policy):
    """Keep the one mask that a probe or a file gave."""

    def observes(self, step: int) -> bool:
        """Never: the mask does not depend on the run."""
        return False

    def refreshes(self, step: int) -> bool:
        """Never."""
        return False


def make_policy(config: EPIConfig) -> Policy:
    """Return the policy that ``config`` names. ``none`` is static with no mask."""
    interval, warmup_steps = config.selection_interval, config.warmup_steps
    match config.policy:
        case PolicyName.EVOLVING:
            return Evolving(interval, warmup_steps)
        case PolicyName.INVERTED:
            return Inverted(interval, warmup_steps)
        case PolicyName.MOMENTUM:
            return Momentum(interval, warmup_steps)
        case PolicyName.FIRST:
            return First(first_active_step(interval, warmup_steps=warmup_steps) - 1)
        case PolicyName.RANDOM:
            return Random(config.seed, config.redraw, interval, warmup_steps)
        case PolicyName.HALF:
            return Half(config.seed)
        case PolicyName.STATIC | PolicyName.NONE:
            return Static()
