"""The model that a name on the command line means: a run's export, a folder in Hugging Face format, or a hub id."""

from __future__ import annotations

import json
from pathlib import Path

from epi_ds.checkpoint.catalog import open_checkpoint
from epi_ds.errors import UserError
from epi_ds.recipe.models import ModelSection
from epi_ds.train.run_folder import RunFolder


def model_of(name: str) -> str:
    """Return the folder or hub id of a model; of a run its export.

    Raises UserError for a run that has not ended and for a checkpoint, neither of which is a model yet.
    """
    path, run = Path(name), RunFolder(Path(name))
    if open_checkpoint(path).manifest is not None:
        raise UserError(
            f"{name} is a checkpoint, whose weights lie in shards; write its model by `epi-ds export {name} OUT`, and "
            "give OUT"
        )
    return str(export_of(path)) if _is_run(run) else name


def export_of(path: Path) -> Path:
    """Return the folder of the model that a run exported. Raises UserError for what is no run, or has not ended."""
    run = RunFolder(path)
    if not _is_run(run):
        raise UserError(f"{path} is no run: there is neither {run.recipe.name} nor {run.metrics.name} in it")
    if not run.has_export:
        found = run.complete_checkpoints()
        newest = found[-1].path if found else run.checkpoints / "checkpoint-N"
        remedy = f"write what a checkpoint holds by `epi-ds export {newest} OUT`, and give OUT"
        raise UserError(
            f"{path} has not ended, so there is no model in {run.export}; let it end, or {remedy}"
            + ("" if found else " (no checkpoint is whole yet)")
        )
    return run.export


def base_of(name: str) -> ModelSection:
    """Return the model that a run began from. Raises UserError for what is no run, which knows none."""
    run = RunFolder(Path(name))
    if not run.recipe.is_file():
        raise UserError(f"{name} is no run, so its base is not known; name it by --against instead of --against-base")
    section = ModelSection.model_validate(json.loads(run.recipe.read_text())["model"])
    return section.model_copy(update={"lora": None})


def _is_run(run: RunFolder) -> bool:
    """Whether a run was ever started in a folder."""
    return run.recipe.is_file() or run.metrics.is_file()
