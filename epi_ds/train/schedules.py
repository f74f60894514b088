"""The learning rate of a run: one schedule of transformers per stage, laid end to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import TrainingArguments, get_scheduler

from epi_ds.errors import UserError
from epi_ds.recipe.models import Stage
from epi_ds.train.stages import StageSpan, stage_at


def learning_rate_of(stage: Stage, span: StageSpan, args: TrainingArguments) -> Callable[[int], float]:
    """Return a stage's learning rate over ``args.learning_rate``, as a function of the step within the stage.

    Raises UserError for a schedule that is no function of the step.
    """
    warmup, peak = stage.warmup_steps, stage.learning_rate or args.learning_rate
    name = stage.lr_scheduler_type or args.lr_scheduler_type
    schedule = get_scheduler(
        name,
        # Only the shape is wanted, which transformers keeps in a scheduler, relative to the optimizer's rate: the
        # stand-in has the stage's, or rates among the arguments of a schedule (min_lr, lr_end) would mean others.
        optimizer=torch.optim.SGD([torch.zeros(1)], lr=peak),
        num_warmup_steps=args.get_warmup_steps(span.num_steps) if warmup is None else warmup,
        num_training_steps=span.num_steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        raise UserError(
            f"stage {stage.name}: lr_scheduler_type {name} depends on metrics and has no shape over a stage; use "
            "constant, linear, cosine or another schedule of the step"
        )
    shape = schedule.lr_lambdas[0]
    return lambda step: peak / args.learning_rate * shape(step)


def laid_end_to_end(spans: Sequence[StageSpan], factors: Sequence[Callable[[int], float]]) -> Callable[[int], float]:
    """Join one learning-rate factor per stage, each a function of the step within its stage, into one for the run."""

    def factor(step: int) -> float:
        span = stage_at(spans, step)
        return factors[spans.index(span)](step - span.first_step)

    return factor
