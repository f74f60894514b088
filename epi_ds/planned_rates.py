"""What a trainer's learning rates will add up to, before it has taken a step."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from epi_ds.errors import UserError


def planned_rates(scheduler: Any, *, first_step: int, stop_step: int) -> list[float]:
    """Return the sums of a scheduler's learning rates over steps ``[first_step, stop_step)``, by parameter group.

    scheduler  of transformers, in whatever accelerate has wrapped it

    Raises UserError for one that is no function of the step.
    """
    while not isinstance(scheduler, LambdaLR):
        inner = getattr(scheduler, "scheduler", None)
        if inner is None:
            raise UserError(
                f"anchor.strength is divided by the sum of the planned learning rates, and those of "
                f"{type(scheduler).__name__} are not known beforehand; set anchor.decay, a pull per unit of learning "
                "rate, or a schedule of the step (constant, linear, cosine)"
            )
        scheduler = inner
    shapes = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    return [float(rate * sum(shape(step) for step in range(first_step, stop_step))) for rate, shape in shapes]
