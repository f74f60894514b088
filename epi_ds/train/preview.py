"""What a recipe would train on, before it does: by the same code that feeds the trainer, and without ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from epi_ds.data.store import NOT_LEARNT, Summary
from epi_ds.evaluation.kept import KeptSource, kept_sources
from epi_ds.recipe.models import Recipe
from epi_ds.recipe.sources import TrainingData
from epi_ds.train.own_rows import own_rows_file
from epi_ds.train.replay import NOTHING, exact_share, new_rows
from epi_ds.train.rows import (
    SourceRows,
    global_batch_of,
    load_tokenizer,
    prepare_here,
    row_arguments_of,
    rows_in,
    stage_rows_of,
)
from epi_ds.train.run_folder import RunFolder
from epi_ds.train.stages import plan_stages


class Stretch(NamedTuple):
    """Some tokens of a row, all of them learnt or none."""

    text: str
    is_learnt: bool


class SourcePreview(NamedTuple):
    """What one source of a stage has."""

    name: str
    summary: Summary
    num_rows: int
    """Rows that its permutations are of: packed ones, where rows are packed."""
    samples: tuple[tuple[Stretch, ...], ...]
    """The first rows, with what the loss is on."""


class StagePreview(NamedTuple):
    """What one stage would train on."""

    name: str
    sources: tuple[SourcePreview, ...]
    num_steps: int
    num_replayed: int
    """Rows of these steps that are drawn from what is kept, and from finished stages."""
    left_over: int
    """Rows of the last, incomplete global batch, which are not trained on."""


class Preview(NamedTuple):
    """What a recipe would train on."""

    stages: tuple[StagePreview, ...]
    kept: tuple[SourcePreview, ...]
    """What must not be forgotten, but for rows that are held out, and the model's own where none are written yet."""


def preview(recipe: Recipe, *, ranks: int, num_samples: int) -> Preview:
    """Prepare the rows of all stages and of what is kept, as a run does, and say what they are.

    Raises what `prepare_here` raises, and UserError for a stage that does not fill one global batch.
    """
    arguments = row_arguments_of(recipe)
    tokenizer = load_tokenizer(recipe.model, arguments)
    keep, own_rows = recipe.method.keep, own_rows_file(recipe, RunFolder(Path(recipe.output)))
    # Rows that the model has not written yet cannot be shown.
    kept = kept_sources(recipe, own_rows if own_rows is not None and own_rows.exists() else None)
    sources: list[TrainingData | KeptSource] = [source for stage in recipe.stages for source in stage.sources]
    sources += kept
    found = [
        _preview_of(source, rows_in(folder), tokenizer, num_samples)
        for source, folder in zip(sources, prepare_here(sources, arguments, tokenizer), strict=True)
    ]
    unused = iter(found)
    grouped = [tuple(next(unused) for _ in stage.sources) for stage in recipe.stages]
    batch = global_batch_of(recipe, ranks=ranks)
    share = NOTHING if keep is None else exact_share(keep.replay)
    return Preview(tuple(_stages_of(recipe, grouped, share=share, global_batch=batch)), kept=tuple(unused))


def _stages_of(
    recipe: Recipe, grouped: Sequence[tuple[SourcePreview, ...]], *, share: Fraction, global_batch: int
) -> Iterator[StagePreview]:
    """Yield the stages, whose sources are ``grouped``, with their steps."""
    stages = [
        stage_rows_of(stage, [one.num_rows for one in group])
        for stage, group in zip(recipe.stages, grouped, strict=True)
    ]
    spans = plan_stages(stages, global_batch=global_batch, replayed_share=share)
    for stage, span, group in zip(stages, spans, grouped, strict=True):
        num_new = new_rows(span.num_steps, share=share, first_step=span.first_step, global_batch=global_batch)
        yield StagePreview(
            name=stage.name,
            sources=group,
            num_steps=span.num_steps,
            num_replayed=span.num_steps * global_batch - num_new,
            left_over=max(stage.num_rows * stage.epochs - num_new, 0),
        )


def _preview_of(
    source: TrainingData | KeptSource, found: SourceRows, tokenizer: Any, num_samples: int
) -> SourcePreview:
    shown = range(min(num_samples, len(found.rows)))
    samples = tuple(tuple(stretches(tokenizer, found.rows[index])) for index in shown)
    return SourcePreview(source.label, found.summary, len(found.rows), samples)


def stretches(tokenizer: Any, row: dict[str, Sequence[int]]) -> Iterator[Stretch]:
    """Yield a row's text, cut where the loss begins and where it ends."""
    tokens = zip(row["input_ids"], row["labels"], strict=True)
    for is_learnt, run in groupby(tokens, lambda token: token[1] != NOT_LEARNT):
        yield Stretch(tokenizer.decode([token for token, _ in run]), is_learnt)
