"""The learning rate of every step is what the recipe says, in numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TrainingArguments, get_scheduler

from epi_ds.errors import UserError
from epi_ds.recipe.models import Stage
from epi_ds.train.schedules import laid_end_to_end, learning_rate_of
from epi_ds.train.stages import StageRows, StageSpan, plan_stages

STEPS = 20


def stage_of(**values: Any) -> Stage:
    return Stage.model_validate({"name": "one", "data": {"skill": "logic", "rows": 4}, **values})


def arguments_of(**values: Any) -> TrainingArguments:
    return TrainingArguments(output_dir="unused", use_cpu=True, **values)


def rates(stage: Stage, args: TrainingArguments) -> list[float]:
    factor = learning_rate_of(stage, StageSpan("one", 0, STEPS), args)
    return [args.learning_rate * factor(step) for step in range(STEPS + 1)]


@pytest.mark.parametrize(
    ("name", "kwargs", "last"),
    [
        ("cosine_with_min_lr", {"min_lr": 1e-6}, 1e-6),
        ("cosine_with_min_lr", {"min_lr_rate": 0.2}, 4e-6),
        ("polynomial", {"lr_end": 5e-7, "power": 1.0}, 5e-7),
        ("linear", {}, 0.0),
        ("constant", {}, 2e-5),
    ],
)
@pytest.mark.parametrize("where", ["train", "stage"])
def test_rates_are_those_of_transformers_own_optimizer(name: str, kwargs: Any, last: float, where: str) -> None:
    """Whether the peak is the run's or the stage's, absolute rates mean themselves."""
    if where == "train":
        stage = stage_of()
        args = arguments_of(learning_rate=2e-5, lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, warmup_steps=3)
    else:
        stage = stage_of(learning_rate=2e-5, lr_scheduler_type=name)
        args = arguments_of(learning_rate=7e-4, lr_scheduler_kwargs=kwargs, warmup_steps=3)
    found = rates(stage, args)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2e-5)
    schedule = get_scheduler(
        name, optimizer, num_warmup_steps=3, num_training_steps=STEPS, scheduler_specific_kwargs=kwargs
    )
    expected = [optimizer.defaults["lr"] * schedule.lr_lambdas[0](step) for step in range(STEPS + 1)]
    # A factor and its inverse round.
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-18)
    assert found[-1] == pytest.approx(last)


def test_a_schedule_of_metrics_is_refused() -> None:
    with pytest.raises(UserError, match="stage one: lr_scheduler_type reduce_lr_on_plateau depends on metrics"):
        rates(stage_of(lr_scheduler_type="reduce_lr_on_plateau"), arguments_of())


def test_schedules_are_laid_end_to_end() -> None:
    spans = plan_stages([StageRows("a", 10, 1), StageRows("b", 7, 3), StageRows("c", 4, 1)], global_batch=4)
    factor = laid_end_to_end(spans, [lambda s: 10.0 + s, lambda s: 20.0 + s, lambda s: 30.0 + s])
    assert [factor(step) for step in range(8)] == [10, 11, 20, 21, 22, 23, 24, 30]
