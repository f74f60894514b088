"""When masks are refreshed, how much they isolate, and whether a planned run would ever use one.

Steps are applied steps.
"""

from __future__ import annotations

import logging
import math

from epi_ds.choices import Curve
from epi_ds.config import EPIConfig, RatioSchedule
from epi_ds.errors import UserError

logger = logging.getLogger(__name__)


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


def check_planned_steps(
    planned_steps: int,
    interval: int,
    *,
    setting: str = "refresh_interval",
    warmup_steps: int = 0,
    allow_inactive: bool,
) -> None:
    """Refuse a run in which no mask would ever be active; warn when it would be for less than half of it.

    planned_steps  applied steps the whole run is going to take
    setting        name of the setting that ``interval`` is the value of
    Raises ValueError unless ``allow_inactive``.
    """
    first = first_active_step(interval, warmup_steps=warmup_steps)
    if planned_steps >= 2 * (first - 1):
        return
    proposal = max(1, planned_steps // 10)
    proposals = [(setting, interval), ("warmup_steps", warmup_steps)]
    remedy = ", ".join(f"{name}: {proposal}" for name, value in proposals if value > proposal)
    if planned_steps >= first:
        logger.warning(
            "the run has %d planned steps and its first mask acts from step %d: a mask is active in less than half of "
            "them; %s would refresh ten times",
            planned_steps,
            first,
            remedy,
        )
        return
    # One step is under no mask, whatever the interval.
    has_time = planned_steps >= first_active_step(proposal, warmup_steps=min(warmup_steps, proposal))
    way = f"Set {remedy}" if has_time else f"Train for 2 steps at least, with {setting}: 1"
    message = (
        f"the run has {planned_steps} planned steps, but the first mask acts from step {first} ({setting} "
        f"{interval}, warmup_steps {warmup_steps}): nothing would ever be isolated. {way}"
    )
    if not allow_inactive:
        raise UserError(message + ", or allow_inactive: true to run anyway")
    logger.warning("%s; running anyway, because allow_inactive is true", message)
