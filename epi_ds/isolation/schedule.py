"""When masks are refreshed, how much they isolate, and whether a planned run would ever use one.

Steps are applied steps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from epi_ds.choices import ADAPTIVE, Curve, PolicyName
from epi_ds.config import EPIConfig, RatioSchedule
from epi_ds.policy_rules import BEGINNING_LATE


def refresh_due(step: int, interval: int, *, warmup_steps: int = 0) -> bool:
    """Whether the mask is selected anew after the applied step number ``step`` (1-based)."""
    return step % interval == 0 and step >= warmup_steps


def first_active_step(interval: int, *, warmup_steps: int = 0) -> int:
    """The first applied step (1-based) that runs under a mask: a refresh after step t acts from t + 1."""
    return max(interval, -(-warmup_steps // interval) * interval) + 1


def ratio_at(ratio: float | RatioSchedule, step: int, *, warmup_steps: int = 0) -> float:
    """Return the ratio of a mask that is selected after the applied step number ``step``.

    A schedule stands at its start until ``warmup_steps`` and at its end from ``steps`` later on.
    """
    if not isinstance(ratio, RatioSchedule):
        return ratio
    progress = min(1.0, max(0.0, (step - warmup_steps) / ratio.steps))
    if ratio.schedule is Curve.COSINE:
        progress = (1.0 - math.cos(math.pi * progress)) / 2.0
    # Rounded, because the last bit of a cosine differs between machines, and all ranks must have the same budget.
    return round(ratio.start + (ratio.end - ratio.start) * progress, 9)


def largest_ratio(config: EPIConfig) -> float:
    """Return the largest ratio that a run may come to."""
    ratio = config.ratio
    if isinstance(ratio, RatioSchedule):
        return max(ratio.start, ratio.end)
    return config.max_ratio if isinstance(ratio, str) else ratio


class TooShort(NamedTuple):
    """What to say of a planned run in which no mask is active, or for less than half of it."""

    message: str
    is_refused: bool
    """Whether such a run is an error."""


def planned_steps_of(config: EPIConfig, planned_steps: int, *, begins_with_mask: bool) -> TooShort | None:
    """Return what to say of a run of so many applied steps; None where there is nothing to say.

    begins_with_mask  whether a mask is selected before the first step, from what was remembered then
    """
    if largest_ratio(config) == 0:
        return None
    warmup_steps, allow_inactive = config.warmup_steps, config.allow_inactive
    if config.policy in BEGINNING_LATE and not begins_with_mask:
        return too_short(
            planned_steps,
            config.selection_interval,
            setting="check_interval" if config.refresh_interval == ADAPTIVE else "refresh_interval",
            warmup_steps=warmup_steps,
            allow_inactive=allow_inactive,
        )
    if config.policy is PolicyName.RANDOM and warmup_steps:
        # Drawn after them, whatever the interval.
        return too_short(planned_steps, 1, warmup_steps=warmup_steps, allow_inactive=allow_inactive)
    return None


def too_short(
    planned_steps: int,
    interval: int,
    *,
    setting: str = "refresh_interval",
    warmup_steps: int = 0,
    allow_inactive: bool,
) -> TooShort | None:
    """Return what to say of a run in which no mask would ever be active, or for less than half of it; None otherwise.

    planned_steps  applied steps the whole run is going to take
    setting        name of the setting that ``interval`` is the value of
    """
    first = first_active_step(interval, warmup_steps=warmup_steps)
    if planned_steps >= 2 * (first - 1):
        return None
    proposal = max(1, planned_steps // 10)
    proposals = [(setting, interval), ("warmup_steps", warmup_steps)]
    remedy = ", ".join(f"{name}: {proposal}" for name, value in proposals if value > proposal)
    if planned_steps >= first:
        return TooShort(
            f"the run has {planned_steps} planned steps and its first mask acts from step {first}: a mask is active in "
            f"less than half of them; {remedy} would refresh ten times",
            is_refused=False,
        )
    # One step is under no mask, whatever the interval.
    has_time = planned_steps >= first_active_step(proposal, warmup_steps=min(warmup_steps, proposal))
    way = f"Set {remedy}" if has_time else f"Train for 2 steps at least, with {setting}: 1"
    message = (
        f"the run has {planned_steps} planned steps, but the first mask acts from step {first} ({setting} "
        f"{interval}, warmup_steps {warmup_steps}): nothing would ever be isolated. {way}"
    )
    if allow_inactive:
        return TooShort(f"{message}; running anyway, because allow_inactive is true", is_refused=False)
    return TooShort(f"{message}, or allow_inactive: true to run anyway", is_refused=True)
