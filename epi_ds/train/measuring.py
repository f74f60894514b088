"""What is measured before the first step: the gradients of which global batches, and their losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from datasets import Dataset, concatenate_datasets
from torch import Tensor

from epi_ds.errors import UserError
from epi_ds.evaluation.kept import HELD_OUT_SHARE
from epi_ds.recipe.keep import BASE, Keep
from epi_ds.train.stages import StageRows, StageSpan, row_order
from epi_ds.train.streams import SourceShare

# By default; the mean of squared gradients of so many batches has settled.
_MOST_WINDOWS = 64


class Measured(NamedTuple):
    """Rows whose gradients are measured before the first step."""

    rows: Any
    """Tokenised, in order; read from the front, and again from there where they are exhausted."""
    num_windows: int
    """Global batches to measure."""
    name: str | None
    """The finished stage that they are remembered as; None where they only select the mask of a static policy."""


def kept_windows(keep: Keep, data: Sequence[Dataset], *, global_batch: int, seed: int) -> Measured:
    """Return what is measured of what is kept: one permutation of its rows, or its sources by their shares.

    data  of every source, in their order

    Raises UserError where the rows do not fill the windows that are asked for, or not one.
    """
    num_rows = sum(map(len, data))
    num_windows = num_windows_of(keep, num_rows, global_batch=global_batch)
    shares = tuple(
        SourceShare(len(rows), source.share)
        for rows, source in zip(data, keep.sources, strict=False)
        if source.share is not None
    )
    plan = StageRows(BASE, num_rows, epochs=1, shares=shares, steps=num_windows)
    order = row_order([plan], [StageSpan(BASE, 0, num_windows)], global_batch=global_batch, seed=seed)
    return Measured(concatenate_datasets(list(data)).select(order), num_windows, BASE)


def num_windows_of(keep: Keep, num_rows: int, *, global_batch: int) -> int:
    """Return how many global batches of so many kept rows are measured.

    Raises UserError where the rows do not fill those that are asked for, or not one.
    """
    filled = num_rows // global_batch
    if filled < (keep.windows or 1):
        asked = "one global batch" if keep.windows is None else f"method.keep.windows: {keep.windows}, global batches"
        raise UserError(
            f"what is kept has {num_rows} rows to measure, fewer than {asked} of {global_batch} (micro-batch x "
            "accumulation x ranks); keep more rows, measure less, or use a smaller batch"
        )
    return keep.windows or min(filled, _MOST_WINDOWS)


def check_own_rows_fill(keep: Keep, *, evaluated: int, global_batch: int) -> None:
    """Raise UserError where the rows that a model is to write are too few to be measured, before it writes them.

    evaluated  the most rows of a source that are held out to be scored
    """
    if keep.self is None or not keep.importance or keep.data is not None:
        return
    held_out = min(keep.self.rows // HELD_OUT_SHARE, evaluated) if keep.evaluation else 0
    num_windows_of(keep, keep.self.rows - held_out, global_batch=global_batch)


def losses_of(trainer: Any, measured: Measured) -> Iterator[Tensor]:
    """Yield this rank's losses of every global batch, one per micro-batch, as ``engine.backward`` takes them.

    Their sum over ranks and micro-batches is the loss that a step on that batch would have: a mean over its tokens,
    however they are dealt. Collective.
    """
    args, rows = trainer.args, measured.rows
    size, accumulation, ranks = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    # The trainer sets it when an epoch begins, and asks it for the share of a loss that it does not divide itself.
    trainer.current_gradient_accumulation_steps = accumulation
    for window in range(measured.num_windows):
        batches = []
        for index in range(accumulation):
            # Dealt to the ranks as the run's own batches are.
            first = ((window * accumulation + index) * ranks + dist.get_rank()) * size
            batches.append(trainer.data_collator([rows[i % len(rows)] for i in range(first, first + size)]))
        num_items = trainer._get_num_items_in_batch(batches, args.device)
        for batch in batches:
            inputs = trainer._prepare_inputs(batch)
            loss = trainer.compute_loss(trainer.model_wrapped, inputs, num_items_in_batch=num_items)
            # A loss over the tokens of the whole window is its share already, and the engine takes the mean.
            yield loss if num_items is None else loss * accumulation
