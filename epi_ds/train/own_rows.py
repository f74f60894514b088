"""The phase before a recipe's trainer exists in which the model writes rows of its own."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from transformers import AutoTokenizer

from epi_ds.checkpoint.verdict import on_first_rank
from epi_ds.errors import UserError
from epi_ds.own_rows.writing import WritingProgress, stands_already, write
from epi_ds.recipe.keep import OwnRows, Written
from epi_ds.recipe.models import Recipe
from epi_ds.train.measuring import check_own_rows_fill
from epi_ds.train.model import load_model
from epi_ds.train.rows import RowArguments, global_batch_of
from epi_ds.train.run_folder import RunFolder

# Seconds between two lines.
_LINE_SECONDS = 5.0


def own_rows_file(recipe: Recipe, folder: RunFolder) -> Path | None:
    """Return where the rows of the model's own stand; None where a recipe wants none."""
    keep = recipe.method.keep
    if keep is None or keep.self is None:
        return None
    return folder.own_rows if keep.self.file is None else Path(keep.self.file)


def write_before_training(
    recipe: Recipe,
    folder: RunFolder,
    tokenizer: Any,
    arguments: RowArguments,
    *,
    resumes: bool,
    console: Console | None,
) -> Path | None:
    """Have the model write its rows, where it has not yet, and return their file; None where none are wanted.

    Collective, after the training arguments were made: they partition the model that is loaded for it, and thrown away.
    Raises UserError where a run goes on and its rows are gone, and for rows that would be too few to be measured.
    """
    file, keep = own_rows_file(recipe, folder), recipe.method.keep
    if file is None or keep is None or keep.self is None:
        return None
    if resumes:
        if not on_first_rank(file.exists):
            raise UserError(
                f"{file} is gone, which holds the rows that the model wrote before the run began: it cannot write them "
                "again. Restore the file, or start over with --restart"
            )
        # What they say is compared with what was trained on, as of every source.
        return file
    check_own_rows_fill(
        keep,
        evaluated=recipe.evaluation.rows,
        global_batch=global_batch_of(recipe, ranks=dist.get_world_size() if dist.is_initialized() else 1),
    )
    settings = _of_kind(keep.self, recipe, arguments)
    if not stands_already(file, settings, model=recipe.model.path):
        model = load_model(recipe.model)
        write(model, tokenizer, file, settings, weights=recipe.evaluation.weights, show=_shown_on(console))
        # The trainer's is loaded anew: an engine that has only generated is none to train with.
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return file


def _of_kind(settings: OwnRows, recipe: Recipe, arguments: RowArguments) -> OwnRows:
    """Return the settings with the kind that ``auto`` means: a template that is only lent says nothing of the model."""
    if settings.kind is not Written.AUTO or arguments.chat_template_path is None:
        return settings
    own = AutoTokenizer.from_pretrained(recipe.model.path, revision=recipe.model.revision)
    kind = Written.TEXTS if own.chat_template is None else Written.CONVERSATIONS
    return settings.model_copy(update={"kind": kind})


def _shown_on(console: Console | None) -> Callable[[WritingProgress], None]:
    """Return what shows progress: a line now and then, and the last one."""
    last = 0.0

    def show(progress: WritingProgress) -> None:
        nonlocal last
        now = time.monotonic()
        if console is not None and (now - last > _LINE_SECONDS or progress.rows >= progress.wanted):
            last = now
            console.print(str(progress), highlight=False)

    return show
