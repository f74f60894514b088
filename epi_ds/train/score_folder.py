"""Score the model of a folder by what a recipe evaluates, outside of a run: a merge, the base, anybody's export."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from epi_ds.evaluation.held import HeldModel
from epi_ds.evaluation.kept import OWN_ROWS, kept_sources, kept_tasks
from epi_ds.evaluation.room import most_scored_tokens
from epi_ds.evaluation.scorer import TaskScorer
from epi_ds.evaluation.scores import Score, Scored
from epi_ds.evaluation.tasks import Task, build_tasks
from epi_ds.recipe.models import ModelSection, Recipe
from epi_ds.train.model import (
    check_vocabulary,
    device_of_one_process,
    load_model,
    stop_at_the_end_of_a_turn,
    told,
)
from epi_ds.train.own_rows import own_rows_file
from epi_ds.train.rows import load_tokenizer, row_arguments_of
from epi_ds.train.run_folder import RunFolder

if TYPE_CHECKING:
    from epi_ds.evaluation.harness.harness import Harness

logger = logging.getLogger(__name__)


class Wanted(NamedTuple):
    """What a folder's model is scored by."""

    recipe: Recipe | None
    """Whose template, lengths and precision count; None where there are tasks of lm-evaluation-harness alone."""
    tasks: Sequence[Task]
    harness: Harness | None
    batch_size: int
    """Most rows of a batch."""


def wanted_by(recipe: Recipe) -> Wanted:
    """Return what runs of a recipe are scored by at the ends of their stages. Raises what `build_tasks` raises."""
    own_rows = own_rows_file(recipe, RunFolder(Path(recipe.output)))
    if own_rows is not None and not own_rows.exists():
        logger.warning("%s: %s, which holds rows that the model writes before a run, is not there", OWN_ROWS, own_rows)
        own_rows = None
    tasks = [*kept_tasks(kept_sources(recipe, own_rows), recipe), *build_tasks(recipe)]
    harness = None
    if recipe.evaluation.lm_eval is not None:
        from epi_ds.evaluation.harness.harness import Harness

        harness = Harness(recipe.evaluation.lm_eval)
    return Wanted(recipe, tasks, harness, recipe.evaluation.batch_size)


def score_folder(
    path: str, wanted: Wanted, *, what: str, show: Callable[[Scored], None] = lambda _: None
) -> dict[str, Score]:
    """Load a model, score it by itself on one device, and let it go; return scores by the names of tasks.

    path  a folder, or a hub id
    what  names it in messages
    show  is called before each batch

    Raises UserError for a model that cannot be loaded, and for rows that its chat template refuses.
    """
    from transformers import AutoTokenizer

    recipe = wanted.recipe
    with torch.inference_mode():
        device = device_of_one_process()
        arguments = None if recipe is None else row_arguments_of(recipe)
        if recipe is None or arguments is None:
            section = ModelSection(path=path)
            with told(path, what=what):
                tokenizer = AutoTokenizer.from_pretrained(path)
        else:
            section = recipe.model.model_copy(update={"path": path, "revision": None})
            tokenizer = load_tokenizer(section, arguments, what=what)
        model = load_model(section, what=what).to(device).eval()
        batch_tokens = most_scored_tokens(model.config)
        held = HeldModel(
            model,
            tokenizer,
            device,
            gathered=True,
            batch_size=wanted.batch_size,
            batch_tokens=batch_tokens,
            show=show,
        )
        scores: dict[str, Score] = {}
        if recipe is not None and arguments is not None and wanted.tasks:
            if arguments.chat_template_path is None:
                check_vocabulary(model, tokenizer, path=path)
            stop_at_the_end_of_a_turn(model, tokenizer)
            scorer = TaskScorer(
                wanted.tasks,
                tokenizer,
                batch_size=wanted.batch_size,
                batch_tokens=batch_tokens,
                max_new_tokens=recipe.evaluation.max_new_tokens,
                max_length=arguments.max_length,
                truncation_mode=arguments.truncation_mode,
            )
            scores |= scorer.score(held)
        if wanted.harness is not None:
            scores |= wanted.harness.score(held)
    # Before another one is read.
    del model, held
    gc.collect()
    return scores
