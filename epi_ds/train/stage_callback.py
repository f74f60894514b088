"""What happens between stages: what is measured before the first, evaluation, and what the next stage begins with."""

from __future__ import annotations

import logging
import time

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from epi_ds.evaluation.evaluator import Evaluator
from epi_ds.hf import EPICallback
from epi_ds.recipe.models import Moments
from epi_ds.train.measuring import losses_of
from epi_ds.train.metrics_callback import BEFORE, MetricsCallback
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
        until: str | None,
    ) -> None:
        """``until`` names the stage after which to stop, None for the last."""
        self._trainer = trainer
        self._isolation = isolation
        self._evaluator = evaluator
        self._metrics = metrics
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
        if state.global_step == 0:
            self._measure()
            self._evaluate(0, BEFORE)
            return
        ended = stage_at(self._spans, state.global_step - 1)
        if state.global_step == ended.stop_step and not self._metrics.has_evaluation(ended.stop_step):
            # The process that ended the stage had no time for it.
            self._evaluate(ended.stop_step, ended.name)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """At the end of a stage evaluate, and prepare importance and optimizer for the next one."""
        step = state.global_step
        stage = stage_at(self._spans, step - 1)
        if step != stage.stop_step:
            return
        if not self._isolation.is_stopping:
            # A job that is about to end saves first: the weights stay as they are until the resumed one evaluates.
            self._evaluate(step, stage.name)
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

    def _evaluate(self, step: int, after: str) -> None:
        started = time.perf_counter()
        scores = self._evaluator.evaluate()
        if scores:
            self._metrics.write_evaluation(step, after, scores, seconds=time.perf_counter() - started)

    def _begin_stage_after(self, stage: StageSpan) -> None:
        position = self._spans.index(stage) + 1
        if position == len(self._spans):
            return
        refresh = self._epi.finish_stage(stage.name)
        if refresh is not None:
            self._metrics.write_refresh(stage.stop_step, stage.name, refresh)
        if self._trainer.stages[position].moments is Moments.RESET:
            self._epi.reset_optimizer_state()
