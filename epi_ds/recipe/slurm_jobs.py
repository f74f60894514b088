"""The jobs of a run: one, an array of its variants, or a chain of its stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from epi_ds.errors import UserError
from epi_ds.launch.slurm import SlurmJob
from epi_ds.launch.sweep import variants_of
from epi_ds.recipe.launch_target import Target, find_target

FOLDER = "slurm"
"""Name of the folder in that of the run that batch scripts and logs lie in."""


def jobs_of(target: Target, job: SlurmJob, *, sweep: Sequence[str] = (), by_stage: bool = False) -> list[SlurmJob]:
    """Return the jobs that train ``target``, each to be submitted after the one before it.

    job       what all of them ask for
    sweep     see `variants_of`
    by_stage  one job for each stage of the recipe

    Raises UserError for a script, which has neither, and for variants that the recipe refuses.
    """
    if target.recipe is None and (sweep or by_stage):
        given = "--sweep" if sweep else "--by-stage"
        raise UserError(f"{given} goes with a recipe, and {target.given} is a script; read SLURM_ARRAY_TASK_ID there")
    variants = variants_of(sweep, output=target.folder)
    for variant in variants:
        # What is wrong with one is to be said now, and not in the queue.
        find_target(target.given, [*target.arguments, *variant])
    job = dataclasses.replace(job, variants=variants)
    if not by_stage:
        return [job]
    if variants:
        raise UserError("--by-stage chains whole jobs, and an array has its own order; give one of --by-stage, --sweep")
    return [
        dataclasses.replace(job, name=f"{job.name}-{number}-{stage}", command=target.until(stage))
        for number, stage in enumerate(target.stages, start=1)
    ]


def folder_of(target: Target, working_directory: Path) -> Path:
    """Return where batch scripts and logs lie."""
    return working_directory / target.folder / FOLDER
