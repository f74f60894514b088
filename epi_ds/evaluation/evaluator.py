"""Evaluate tasks on all ranks of a ZeRO-3 engine, while it trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from trl.models import unwrap_model_for_generation

from epi_ds.evaluation.held import HeldModel
from epi_ds.evaluation.room import Weights, fits_gathered, most_scored_tokens
from epi_ds.evaluation.scorer import TaskScorer
from epi_ds.evaluation.scores import Score, Scored
from epi_ds.evaluation.tasks import Task
from epi_ds.zero3.local_forwards import local_forwards

if TYPE_CHECKING:
    # Imports lm-evaluation-harness, which takes a second and an extra.
    from epi_ds.evaluation.harness.harness import Harness

logger = logging.getLogger(__name__)


class Evaluator:
    """Evaluates tasks with a trainer's engine, model and tokenizer."""

    def __init__(
        self,
        trainer: Any,
        tasks: Sequence[Task],
        *,
        batch_size: int,
        max_new_tokens: int,
        weights: Weights,
        harness: Harness | None = None,
    ) -> None:
        """``harness`` holds tasks of lm-evaluation-harness, which are scored behind all others.

        Raises what `TaskScorer` raises.
        """
        self._trainer = trainer
        self._harness = harness
        self._batch_size = batch_size
        self._batch_tokens = most_scored_tokens(trainer.model.config)
        self._scorer = TaskScorer(
            tasks,
            trainer.processing_class,
            batch_size=batch_size,
            batch_tokens=self._batch_tokens,
            max_new_tokens=max_new_tokens,
            max_length=trainer.args.max_length,
            truncation_mode=trainer.args.truncation_mode,
        )
        self._is_empty = not tasks and harness is None
        self._weights = weights
        self._announced: bool | None = None

    def evaluate(self, show: Callable[[Scored], None] | None = None) -> dict[str, Score]:
        """Score every task. Collective. Leaves the model in the mode it was in, and every random state alone.

        show  is called before each of this rank's batches
        """
        if self._is_empty:
            return {}
        gathered = self._gathers()
        model = self._trainer.model
        was_training = model.training
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(), self._model(gathered) as unwrapped:
            held = self._held(unwrapped, gathered=gathered, show=show or (lambda _: None))
            scores = self._scorer.score(held)
            if self._harness is not None:
                scores |= self._harness.score(held)
        model.train(was_training)
        return scores

    def _held(self, model: Any, *, gathered: bool, show: Callable[[Scored], None]) -> HeldModel:
        return HeldModel(
            model,
            self._trainer.processing_class,
            self._trainer.accelerator.device,
            gathered=gathered,
            batch_size=self._batch_size,
            batch_tokens=self._batch_tokens,
            show=show,
        )

    def _gathers(self) -> bool:
        """Decide, alike on all ranks, whether the whole model fits on every one of them now."""
        gathered = fits_gathered(self._trainer.model, self._trainer.accelerator.device, weights=self._weights)
        if gathered is not self._announced and dist.get_rank() == 0:
            logger.info(
                "evaluation %s",
                "gathers the weights once" if gathered else "keeps weights partitioned and generates in step",
            )
        self._announced = gathered
        return gathered

    @contextmanager
    def _model(self, gathered: bool) -> Iterator[Any]:
        """Yield the model to generate with, without the forward that TRL patched in for training."""
        trainer = self._trainer
        checkpointing = trainer.model.is_gradient_checkpointing
        with (
            unwrap_model_for_generation(
                trainer.model_wrapped, trainer.accelerator, gather_deepspeed3_params=gathered
            ) as unwrapped,
            # Ranks have different numbers of batches, or none.
            local_forwards(trainer.model_wrapped) if gathered else nullcontext(),
        ):
            yield unwrapped
        if checkpointing:
            # TRL turns it off while generating, and on again with the defaults instead of the user's settings.
            trainer.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs
            )
