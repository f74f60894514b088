"""What a recipe would train on, before it does: by the same code that feeds the trainer, and without ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from epi_ds.data.store import NOT_LEARNT, Summary
from epi_ds.recipe.models import Recipe
from epi_ds.train.rows import load_tokenizer, prepare_here, row_arguments_of, rows_in
from epi_ds.train.stages import StageRows, plan_stages


class Stretch(NamedTuple):
    """Some tokens of a row, all of them learnt or none."""

    text: str
    is_learnt: bool


class StagePreview(NamedTuple):
    """What one stage would train on."""

    name: str
    summary: Summary
    num_rows: int
    """Rows that a permutation is of: packed ones, where rows are packed."""
    num_steps: int
    left_over: int
    """Rows of the last, incomplete global batch, which are not trained on."""
    samples: tuple[tuple[Stretch, ...], ...]
    """The first rows, with what the loss is on."""


def preview(recipe: Recipe, *, ranks: int, num_samples: int) -> list[StagePreview]:
    """Prepare the rows of all stages, as a run does, and say what they are.

    Raises what `prepare_here` raises, and UserError for a stage that does not fill one global batch.
    """
    arguments = row_arguments_of(recipe)
    tokenizer = load_tokenizer(recipe.model, arguments)
    folders = prepare_here([stage.data for stage in recipe.stages], arguments, tokenizer)
    found = [rows_in(folder) for folder in folders]
    counts = [
        StageRows(stage.name, len(one.rows), stage.epochs) for stage, one in zip(recipe.stages, found, strict=True)
    ]
    batch = global_batch_of(recipe, ranks=ranks)
    return [
        StagePreview(
            name=count.name,
            summary=one.summary,
            num_rows=count.num_rows,
            num_steps=span.num_steps,
            left_over=count.num_rows * count.epochs - span.num_steps * batch,
            samples=tuple(
                tuple(stretches(tokenizer, one.rows[index])) for index in range(min(num_samples, len(one.rows)))
            ),
        )
        for count, span, one in zip(counts, plan_stages(counts, global_batch=batch), found, strict=True)
    ]


def global_batch_of(recipe: Recipe, *, ranks: int) -> int:
    """Return how many rows a step of a recipe trains."""
    # TRL's defaults.
    micro_batch: int = recipe.train.get("per_device_train_batch_size", 8)
    accumulation: int = recipe.train.get("gradient_accumulation_steps", 1)
    return micro_batch * accumulation * ranks


def stretches(tokenizer: Any, row: dict[str, Sequence[int]]) -> Iterator[Stretch]:
    """Yield a row's text, cut where the loss begins and where it ends."""
    tokens = zip(row["input_ids"], row["labels"], strict=True)
    for is_learnt, run in groupby(tokens, lambda token: token[1] != NOT_LEARNT):
        yield Stretch(tokenizer.decode([token for token, _ in run]), is_learnt)
