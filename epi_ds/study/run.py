"""Run the cells of a study on this machine: bases first, each cell a run of its own, of one rank or of several."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import epi_ds
from epi_ds.errors import RemedyError
from epi_ds.launch.local import free_port
from epi_ds.study.cells import (
    Cell,
    WorkFolder,
    base_settings,
    digest_of,
    merge_of,
    own_rows_of,
    run_of,
    validated,
)
from epi_ds.study.jobs import Ended, Job, run_jobs
from epi_ds.study.models import Study
from epi_ds.study.result_lines import Result, Status, append_result, check_writable, newest, read_results
from epi_ds.study.scoring import scores_of
from epi_ds.train.metrics import read_metrics
from epi_ds.train.run_folder import RunFolder

_LOG_LINES = 12


class Progress(NamedTuple):
    """What a study says as it goes."""

    started: Callable[[str], None]
    ended: Callable[[Result], None]


def pending(study: Study, cells: Iterable[Cell], results: Path) -> list[Cell]:
    """Return the cells that are not finished with their present settings: those that failed are among them."""
    cells = list(cells)
    found = newest(read_results(results), {cell: digest_of(study, cell) for cell in cells})
    return [cell for cell in cells if cell not in found or found[cell].status is not Status.OK]


def run_cells(
    study: Study, cells: Sequence[Cell], *, work: WorkFolder, results: Path, side_by_side: int, progress: Progress
) -> int:
    """Run cells, ``side_by_side`` at a time, and append a line for each as it ends; return how many failed.

    Raises UserError before anything runs for an arm whose recipe is wrong, and where results cannot be written.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // (side_by_side * study.ranks))
    check_writable(results)
    for cell in cells:
        validated(study, cell, work)
    failed = 0

    def record(result: Result) -> None:
        nonlocal failed
        failed += result.status is Status.FAILED
        append_result(results, result)
        progress.ended(result)

    made = _MadeHere(study, work, threads, record)
    jobs = [*made.bases(cells), *(made.cell(cell) for cell in cells)]
    run_jobs(jobs, side_by_side=side_by_side, started=lambda job: progress.started(job.name))
    return failed


class _MadeHere:
    """Makes jobs of cells and of what they share, and results of what they leave."""

    def __init__(self, study: Study, work: WorkFolder, threads: int, record: Callable[[Result], None]) -> None:
        self._study, self._work, self._record = study, work, record
        # What is given stands: a batch script knows how many cores are its own.
        self._environment = {"OMP_NUM_THREADS": str(threads), **os.environ}

    def bases(self, cells: Sequence[Cell]) -> list[Job]:
        """Return the jobs that make the bases that are not there."""
        if self._study.base.pretrain is None:
            return []
        by_folder = {self._work.base(self._study, cell): cell for cell in reversed(cells)}
        return [self._base(folder, cell) for folder, cell in reversed(by_folder.items()) if not folder.exists()]

    def _base(self, folder: Path, cell: Cell) -> Job:
        settings = json.dumps(base_settings(self._study, cell))
        return Job(
            name=f"base of {cell.target}, seed {cell.seed}",
            command=[sys.executable, "-m", "epi_ds.study.base_model", str(folder), settings],
            environment=lambda: self._environment,
            log=_log_of(folder),
            # Cells that need it say that it is missing.
            ended=lambda ended: None,
            makes=(folder,),
            only_makes=True,
        )

    def cell(self, cell: Cell) -> Job:
        """Return the job of a cell."""
        folder, values = self._work.cell(cell), run_of(self._study, cell, self._work)
        file = folder / "recipe.yaml"

        def begins() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            if file.exists() and yaml.safe_load(file.read_text()) != values:
                # Of other settings: a run does not go on from them.
                shutil.rmtree(folder / "run", ignore_errors=True)
            file.write_text(yaml.safe_dump(values, sort_keys=False))

        own_rows, base = own_rows_of(values), self._work.base(self._study, cell)
        return Job(
            name=cell.name,
            # One rank as it is: a launcher would be two more processes. Several are started by the command itself.
            command=[sys.executable, "-u", "-m", "epi_ds.cli.main", "train", str(file)],
            environment=lambda: {**self._environment, **(_only_rank() if self._study.ranks == 1 else {})},
            log=folder / "log.txt",
            begins=begins,
            ended=lambda ended: self._record(self._result(cell, ended)),
            needs=() if self._study.base.pretrain is None else (base,),
            makes=() if own_rows is None else (own_rows,),
        )

    def _result(self, cell: Cell, ended: Ended) -> Result:
        study, folder = self._study, self._work.cell(cell)
        known: dict[str, Any] = {
            "study": study.name,
            "protocol": study.protocol,
            **cell._asdict(),
            "seconds": ended.seconds,
            "peak_bytes": ended.peak_bytes,
            "digest": digest_of(study, cell),
            "version": epi_ds.__version__,
        }
        try:
            found = self._measured(cell, ended)
        except (RemedyError, OSError) as error:
            told = f"{error}\n{_last_lines(folder / 'log.txt')}".strip()
            return Result(**known, status=Status.FAILED, error=told)
        return Result(**known, status=Status.OK, **found)

    def _measured(self, cell: Cell, ended: Ended) -> dict[str, Any]:
        """Return what a finished cell's run is worth. Raises RemedyError where it did not finish."""
        # It takes torch, which a study whose cells are all finished does not need.
        from epi_ds.study.end_measures import Finished, measures_of
        from epi_ds.study.merged import Merged, merged

        study = self._study
        base = self._work.base(study, cell)
        if ended.exit_code is None:
            raise RemedyError(f"there is no base {base}: its pretraining failed\n{_last_lines(_log_of(base))}")
        if ended.exit_code:
            raise RemedyError(f"the run ended with exit code {ended.exit_code}")
        run = RunFolder(self._work.cell(cell) / "run")
        recipe = validated(study, cell, self._work)
        metrics = list(read_metrics(run.metrics))
        scored = Merged(run.export, metrics)
        if (alpha := merge_of(study, cell)) is not None:
            scored = merged(run, recipe, base, alpha=alpha, metrics=metrics)
        found = scores_of(
            scored.lines,
            protocol=study.protocol,
            stages=[stage.name for stage in recipe.stages],
            kept=study.kept_tasks(cell.target),
        )._asdict()
        finished = Finished(
            run,
            recipe,
            base,
            scored.folder,
            is_made=study.base.pretrain is not None,
            base_skills=study.kept_skills(cell.target),
        )
        found |= measures_of(finished, metrics)
        # The scores are taken, and a study has hundreds of runs.
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        for folder in {run.export, scored.folder}:
            shutil.rmtree(folder, ignore_errors=True)
        return found


def _only_rank() -> dict[str, str]:
    """Return what a launcher gives the one rank that it starts."""
    numbers = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    return {**numbers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def _log_of(base: Path) -> Path:
    return base.with_name(f"{base.name}.log")


def _last_lines(log: Path) -> str:
    if not log.is_file():
        return ""
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
