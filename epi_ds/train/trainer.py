"""TRL's SFTTrainer over stages: one engine, one ordered list of rows, schedules laid end to end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from epi_ds.checkpoint.durable import write_json
from epi_ds.errors import RemedyError
from epi_ds.recipe.keep import ReplayLoss
from epi_ds.recipe.models import Stage
from epi_ds.train.kept_rows import KeptRows, parts_of
from epi_ds.train.measuring import Measured, kept_windows
from epi_ds.train.planned_rows import SOURCE, SOURCES, PlannedRows, SourceCollator
from epi_ds.train.replay import NOTHING, replayed_rows
from epi_ds.train.resume import MARKER
from epi_ds.train.rows import stage_rows_of
from epi_ds.train.schedules import laid_end_to_end, learning_rate_of
from epi_ds.train.share_loss import share_weights
from epi_ds.train.source_losses import SourceLosses
from epi_ds.train.stages import StageSpan, epoch_ends, plan_stages, row_order
from epi_ds.train.token_losses import ObservedModel


class StageTrainer(SFTTrainer):
    """An SFTTrainer whose training rows are the stages' rows in the order of `row_order`."""

    def __init__(
        self,
        *,
        stages: Sequence[Stage],
        stage_data: Sequence[Sequence[Dataset]],
        probe_steps: int | None,
        probe_data: Dataset | None,
        marker: dict[str, Any],
        args: SFTConfig,
        kept: KeptRows | None = None,
        **kwargs: Any,
    ) -> None:
        """``stage_data``, of every stage's sources, and ``probe_data`` are tokenised rows with labels.

        The other arguments are SFTTrainer's.

        ``kept`` rows are measured and replayed as it says. A probe takes ``probe_steps`` global batches, of the rows of
        the run where there are no ``probe_data``. ``marker`` is written into every checkpoint, see `marker_of`.
        """
        self.stages = list(stages)
        self._marker = marker
        self._stage_data = list(stage_data)
        self._probe_steps, self._probe_data = probe_steps, probe_data
        self._kept = kept
        self._replayed_share = NOTHING
        self._token_weights: Tensor | None = None
        """In this step, by the number of a source; None where all tokens weigh the same."""
        self.spans: list[StageSpan] = []
        self.epoch_ends: frozenset[int] = frozenset()
        """Numbers of steps after which an epoch of a stage has ended."""
        self.measured: Measured | None = None
        """What is measured before the first step; None for nothing."""
        self.save_started = 0.0
        """When the newest save of a checkpoint began, by ``time.perf_counter``."""
        # TRL looks at this one to learn the rows' form, and then asks `_prepare_dataset` for what is trained.
        super().__init__(args=args, train_dataset=self._stage_data[0][0], **kwargs)
        collator: Any = self.data_collator  # type: ignore[has-type]
        self.data_collator = SourceCollator(collator)

    @property
    def global_batch(self) -> int:
        """Rows per optimizer step over all ranks."""
        batch: int = (
            self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        )
        return batch

    @property
    def num_rows(self) -> dict[str, list[int]]:
        """Rows of every stage's sources, by its name; packed ones count as the sequences that they were packed into."""
        stages = zip(self.stages, self._stage_data, strict=True)
        return {stage.name: [len(one) for one in data] for stage, data in stages}

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: SFTConfig, *rest: Any) -> Any:
        """Put the rows of all stages in order. They are tokenised already: no sequence spans two stages."""
        self.args = args
        counts = [
            stage_rows_of(stage, [len(one) for one in data])
            for stage, data in zip(self.stages, self._stage_data, strict=True)
        ]
        batch, replay = self.global_batch, None if self._kept is None else self._kept.replay
        if replay is not None:
            self._replayed_share = replay.share
        self.spans = plan_stages(counts, global_batch=batch, replayed_share=self._replayed_share)
        self.epoch_ends = epoch_ends(counts, self.spans, global_batch=batch, replayed_share=self._replayed_share)
        order = row_order(counts, self.spans, global_batch=batch, seed=args.seed, replay=replay)
        self._rows = PlannedRows(parts_of(self.stages, self._stage_data, self._kept), order)
        self.source_losses = SourceLosses(self._rows.sources)
        self.measured = self._measured()
        return self._rows

    def _set_signature_columns_if_needed(self) -> None:
        """Leave a row the number of its source."""
        super()._set_signature_columns_if_needed()
        if SOURCE not in self._signature_columns:
            self._signature_columns.append(SOURCE)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return this rank's micro-batches of the next step, and how many tokens all ranks learn in it. Collective.

        Raises RemedyError where the loss of replayed rows cannot be averaged as the recipe says.
        """
        batches, num_tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        replayed = replayed_rows(self._replayed_share, self.state.global_step, global_batch=self.global_batch)
        self._token_weights = None
        if 0 < replayed < self.global_batch and self._kept and self._kept.keep.replay_loss is ReplayLoss.SHARE:
            if num_tokens is None:
                raise RemedyError(
                    f"{type(self.model).__name__} averages its loss in every micro-batch by itself, so the share of "
                    "replayed rows in it cannot be set; set method.keep.replay_loss: token"
                )
            first = self.state.global_step * self.global_batch
            self._token_weights = share_weights(
                batches,
                self._rows.is_replayed,
                rows=self._rows.rows_by_source(first, first + self.global_batch),
                num_tokens=num_tokens,
                device=device,
            )
        return batches, num_tokens

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a micro-batch; in training note that of every source, and weigh what is replayed."""
        sources = inputs.pop(SOURCES, None)
        if sources is None or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # The first token of a row is never predicted.
        sources = sources[:, 1:]
        weights = None if self._token_weights is None else self._token_weights[sources]
        observed = ObservedModel(model, weights)
        loss = super().compute_loss(observed, inputs, num_items_in_batch=num_items_in_batch)
        losses = observed.losses(self.args.loss_type)
        self.source_losses.add(losses, sources, observed.is_learnt)
        if weights is None:
            return loss
        # Its gradient is the weighted one already.
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return loss + ((weights - 1) * losses).sum() * ranks / num_items_in_batch

    def _measured(self) -> Measured | None:
        """Return what is measured before the first step."""
        if self._kept is not None and self._kept.keep.importance:
            return kept_windows(self._kept.keep, self._kept.rows, global_batch=self.global_batch, seed=self.args.seed)
        if self._probe_steps is None:
            return None
        return Measured(self._rows if self._probe_data is None else self._probe_data, self._probe_steps, None)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Lay the stages' schedules end to end."""
        if getattr(self, "lr_scheduler", None) is None:
            stages = zip(self.stages, self.spans, strict=True)
            factors = [learning_rate_of(stage, span, self.args) for stage, span in stages]
            factor = laid_end_to_end(self.spans, factors)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none beside checkpoints: TRL's would name no base. The export has the run's own."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint, which the callback's ``on_save`` completes."""
        self.save_started = time.perf_counter()
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole model; in a checkpoint only what the weights in DeepSpeed's shards lack to be one."""
        if not _internal_call:
            super().save_model(output_dir)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.model.config.save_pretrained(folder)
            if self.model.can_generate():
                self.model.generation_config.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)
            write_json(folder / MARKER, self._marker)
