"""What happens between steps: what is measured before the first, evaluation, and what the next stage begins with."""

from __future__ import annotations

import logging
import time

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from epi_ds.evaluation.evaluator import Evaluator
from epi_ds.hf import EPICallback
from epi_ds.planned_rates import planned_rates
from epi_ds.recipe.models import Moments
from epi_ds.train.measuring import losses_of
from epi_ds.train.metrics import BEFORE
from epi_ds.train.metrics_callback import MetricsCallback
from epi_ds.train.stages import StageSpan, stage_at
from epi_ds.train.trainer import StageTrainer
from epi_ds.zero3.handle import EPI

logger = logging.getLogger(__name__)


class StageCallback(TrainerCallback):
    """Begins and ends the stages of a recipe around a trainer. Collective: every rank calls all of it."""

    def __init__(
        self,
        trainer: StageTrainer,
        *,
        isolation: EPICallback,
        evaluator: Evaluator,
        metrics: MetricsCallback,
        every: int | None,
        until: str | None,
    ) -> None:
        """``every`` so many steps tasks are scored, besides the ends of stages; None for those only.

        ``until`` names the stage after which to stop, None for the last.
        """
        self._trainer = trainer
        self._isolation = isolation
        self._evaluator = evaluator
        self._metrics = metrics
        self._every = every
        self._until = until

    @property
    def _epi(self) -> EPI:
        return self._isolation.epi

    @property
    def _spans(self) -> list[StageSpan]:
        return self._trainer.spans

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Before the first step, measure where asked for, and evaluate; else evaluate what an earlier process had
        not.
        """
        self._plan(stage_at(self._spans, state.global_step))
        if state.global_step == 0:
            self._measure()
            self._evaluate(0, BEFORE)
            return
        if self._is_evaluated(state.global_step) and not self._metrics.has_evaluation(state.global_step):
            # The process that took the step had no time for it.
            self._evaluate(state.global_step, stage_at(self._spans, state.global_step - 1).name)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Evaluate where it is due; at the end of a stage prepare importance and optimizer for the next one."""
        step = state.global_step
        stage = stage_at(self._spans, step - 1)
        if self._is_evaluated(step) and not self._isolation.is_stopping:
            # A job that is about to end saves first: the weights stay as they are until the resumed one evaluates.
            self._evaluate(step, stage.name)
        if step != stage.stop_step:
            return
        self._begin_stage_after(stage)
        if stage.name == self._until and step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def _measure(self) -> None:
        """Measure what is kept, and remember it, or what a static mask is selected from."""
        measured = self._trainer.measured
        if measured is None:
            return
        model = self._trainer.model
        was_training = model.training
        model.eval()
        losses = losses_of(self._trainer, measured)
        name = measured.name
        refresh = self._epi.probe(losses) if name is None else self._epi.remember(name, losses)
        model.train(was_training)
        if dist.get_rank() == 0:
            logger.info("importance was measured on %d global batches", measured.num_windows)
        if refresh is not None:
            self._metrics.write_refresh(0, BEFORE, refresh)

    def _is_evaluated(self, step: int) -> bool:
        """Whether tasks are scored after a step."""
        is_end = step == stage_at(self._spans, step - 1).stop_step
        return is_end or (self._every is not None and step % self._every == 0)

    def _evaluate(self, step: int, stage: str) -> None:
        started = time.perf_counter()
        scores = self._evaluator.evaluate(self._metrics.show_scored)
        if scores:
            self._metrics.write_evaluation(step, stage, scores, seconds=time.perf_counter() - started)

    def _begin_stage_after(self, stage: StageSpan) -> None:
        position = self._spans.index(stage) + 1
        if position == len(self._spans):
            return
        refresh = self._epi.finish_stage(stage.name)
        if refresh is not None:
            self._metrics.write_refresh(stage.stop_step, stage.name, refresh)
        if self._trainer.stages[position].moments is Moments.RESET:
            self._epi.reset_optimizer_state()
        self._plan(self._spans[position])

    def _plan(self, stage: StageSpan) -> None:
        """Say what the stage's learning rates will add up to, where an anchor's strength depends on it."""
        if self._epi.awaits_plan:
            rates = planned_rates(self._trainer.lr_scheduler, first_step=stage.first_step, stop_step=stage.stop_step)
            self._epi.plan_stage(rates)
