"""The cells of a study as an array of Slurm jobs: every task is the command that runs one cell alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from epi_ds.launch.slurm import SlurmJob
from epi_ds.study.cells import Cell, WorkFolder

FOLDER = "slurm"
"""Name of the folder in that of the runs that the batch script and logs lie in."""


def array_of(
    study: str,
    cells: Sequence[Cell],
    *,
    work: WorkFolder,
    results: Path,
    cpus: int,
    parallel: int | None,
    options: Sequence[str],
) -> SlurmJob:
    """Return the job whose tasks run cells, in their order.

    study     as the command takes it, by name or by absolute path
    cpus      for each task
    parallel  tasks at the same time; None for as many as there is room for
    options   further ones of sbatch

    What tasks share they make under locks, so none waits for a job before it; see `maker_locks`.
    """
    name = Path(study).stem
    shared = ("--jobs", "1", "--work", str(work.root), "--results", str(results))
    return SlurmJob(
        name=name,
        command=("-m", "epi_ds.cli.main", "study", "run", study, *shared),
        folder=work.root / FOLDER,
        working_directory=Path.cwd(),
        cpus_per_rank=cpus,
        options=tuple(options),
        variants=tuple(("--arms", cell.arm, "--seeds", str(cell.seed), "--targets", cell.target) for cell in cells),
        parallel=parallel,
        python=sys.executable,
    )
