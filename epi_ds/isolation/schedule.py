"""When masks are refreshed, and whether a planned run would ever use one. Steps are applied steps."""

from __future__ import annotations

import logging

from epi_ds.errors import UserError

logger = logging.getLogger(__name__)


def refresh_due(step: int, interval: int) -> bool:
    """Whether the mask is selected anew after the applied step number ``step`` (1-based)."""
    return step % interval == 0


def first_active_step(interval: int) -> int:
    """The first applied step (1-based) that runs under a mask: a refresh after step t acts from t + 1."""
    return interval + 1


def check_planned_steps(planned_steps: int, interval: int, *, allow_inactive: bool) -> None:
    """Refuse a run in which no mask would ever be active; warn when it would be for less than half of it.

    planned_steps  applied steps the whole run is going to take
    Raises ValueError unless ``allow_inactive``.
    """
    if planned_steps >= 2 * interval:
        return
    proposal = max(1, planned_steps // 10)
    if planned_steps >= first_active_step(interval):
        logger.warning(
            "the run has %d planned steps and refresh_interval is %d: a mask is active in less than half of them; "
            "refresh_interval: %d would refresh ten times",
            planned_steps,
            interval,
            proposal,
        )
        return
    message = (
        f"the run has {planned_steps} planned steps, but the first mask acts from step {first_active_step(interval)} "
        f"(refresh_interval {interval}): nothing would ever be isolated. Set refresh_interval to {proposal}"
    )
    if not allow_inactive:
        raise UserError(message + ", or allow_inactive: true to run anyway")
    logger.warning("%s; running anyway, because allow_inactive is true", message)
