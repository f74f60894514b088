"""TRL's SFTTrainer over stages: one engine, one ordered list of rows, schedules laid end to end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from trl import SFTConfig, SFTTrainer

from epi_ds.checkpoint.durable import write_json
from epi_ds.recipe.keep import Keep
from epi_ds.recipe.models import Stage
from epi_ds.train.measuring import Measured, kept_windows
from epi_ds.train.resume import MARKER
from epi_ds.train.rows import stage_rows_of
from epi_ds.train.schedules import laid_end_to_end, learning_rate_of
from epi_ds.train.stages import StageSpan, plan_stages, row_order


class StageTrainer(SFTTrainer):
    """An SFTTrainer whose training rows are the stages' rows in the order of `row_order`."""

    def __init__(
        self,
        *,
        stages: Sequence[Stage],
        stage_data: Sequence[Sequence[Dataset]],
        keep: Keep | None,
        kept_data: Sequence[Dataset],
        probe_steps: int | None,
        probe_data: Dataset | None,
        marker: dict[str, Any],
        args: SFTConfig,
        **kwargs: Any,
    ) -> None:
        """``stage_data``, of every stage's sources, and ``probe_data`` are tokenised rows with labels.

        The other arguments are SFTTrainer's.

        ``kept_data`` are those of the sources of ``keep``. A probe takes ``probe_steps`` global batches, of the rows of
        the run where there are no ``probe_data``. ``marker`` is written into every checkpoint, see `marker_of`.
        """
        self.stages = list(stages)
        self._marker = marker
        self._stage_data = list(stage_data)
        self._keep, self._kept_data = keep, list(kept_data)
        self._probe_steps, self._probe_data = probe_steps, probe_data
        self.spans: list[StageSpan] = []
        self.measured: Measured | None = None
        """What is measured before the first step; None for nothing."""
        # TRL looks at this one to learn the rows' form, and then asks `_prepare_dataset` for what is trained.
        super().__init__(args=args, train_dataset=self._stage_data[0][0], **kwargs)

    @property
    def global_batch(self) -> int:
        """Rows per optimizer step over all ranks."""
        batch: int = (
            self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        )
        return batch

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: SFTConfig, *rest: Any) -> Any:
        """Put the rows of all stages in order. They are tokenised already: no sequence spans two stages."""
        self.args = args
        counts = [
            stage_rows_of(stage, [len(one) for one in data])
            for stage, data in zip(self.stages, self._stage_data, strict=True)
        ]
        self.spans = plan_stages(counts, global_batch=self.global_batch)
        order = row_order(counts, self.spans, global_batch=self.global_batch, seed=args.seed)
        rows = concatenate_datasets([one for data in self._stage_data for one in data]).select(order)
        self.measured = self._measured(rows)
        return rows

    def _measured(self, rows: Dataset) -> Measured | None:
        """Return what is measured before the first step of a run over ``rows``."""
        args = self.args
        if self._keep is not None and self._keep.importance:
            return kept_windows(self._keep, self._kept_data, global_batch=self.global_batch, seed=args.seed)
        if self._probe_steps is None:
            return None
        return Measured(rows if self._probe_data is None else self._probe_data, self._probe_steps, None)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Lay the stages' schedules end to end."""
        if getattr(self, "lr_scheduler", None) is None:
            stages = zip(self.stages, self.spans, strict=True)
            factors = [learning_rate_of(stage, span, self.args) for stage, span in stages]
            factor = laid_end_to_end(self.spans, factors)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

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
