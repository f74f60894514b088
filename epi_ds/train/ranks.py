"""The life of a recipe's ranks: their start on this machine, a lost one, and their end."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from epi_ds.errors import DiskError, LostRankError
from epi_ds.recipe.models import Recipe
from epi_ds.trackers import check_installed, trackers_in
from epi_ds.train.run_folder import RunFolder
from epi_ds.train.start import Start

logger = logging.getLogger(__name__)

MODULE = "epi_ds.cli.main"
"""What every rank runs."""


def start_ranks(recipe: Recipe, arguments: Sequence[str], *, num_ranks: int | None = None) -> int:
    """Run ``epi-ds`` with these arguments in ranks of this machine; return the exit code.

    num_ranks  None for as many as the recipe says

    Raises UserError, before any starts, for a tracker that is not installed, and LostRankError where a rank was killed.
    """
    check_installed(trackers_in(recipe.train.get("report_to")))
    from epi_ds.launch.environment import default_ranks
    from epi_ds.launch.local import run_ranks
    from epi_ds.launch.lost_ranks import OF_A_DEATH, signal_of

    exit_code = run_ranks(MODULE, arguments, num_ranks=num_ranks or recipe.ranks or default_ranks())
    if number := signal_of(exit_code):
        raise LostRankError(f"a rank or the launcher was ended by {number.name}. {OF_A_DEATH}. {_remedy(recipe)}")
    return exit_code


def train_as_rank(recipe: Recipe, start: Start, *, show: Callable[[Path], None]) -> None:
    """Train as one of the ranks.

    show  called on rank 0 with the folder of a run that was trained

    Raises UserError for a tracker that is not installed, LostRankError where another rank dies or stands still, and
    DiskError where this one cannot write what is not a checkpoint's.
    """
    check_installed(trackers_in(recipe.train.get("report_to")))
    if recipe.ranks not in (None, int(os.environ["WORLD_SIZE"])) and os.environ["RANK"] == "0":
        logger.warning("ranks: %d is ignored, because %s were started", recipe.ranks, os.environ["WORLD_SIZE"])
    import torch.distributed as dist

    from epi_ds.checkpoint.disk import disk_problem
    from epi_ds.checkpoint.verdict import on_first_rank
    from epi_ds.launch.local import remove_buffers
    from epi_ds.launch.lost_ranks import die_with_launcher, lost_rank
    from epi_ds.train.run import run_recipe

    die_with_launcher()
    place = Path(recipe.output)
    threading.excepthook = partial(_tell_of_thread, threading.excepthook, place)
    try:
        folder = run_recipe(recipe, start)
        if folder is not None:
            root = folder.root
            on_first_rank(lambda: show(root))
        dist.destroy_process_group()
    except Exception as error:
        if problem := disk_problem(error, place=place):
            # What trackers cannot write while this process ends either follows from it, and has nothing to add.
            sys.unraisablehook = threading.excepthook = _say_nothing
            raise DiskError(f"rank {os.environ['RANK']}: {problem}. {_remedy(recipe)}") from error
        if isinstance(error, RuntimeError) and (reason := lost_rank(error)):
            raise LostRankError(f"rank {os.environ['RANK']}: {reason}. {_remedy(recipe)}") from error
        raise
    finally:
        if os.environ["LOCAL_RANK"] == "0":
            # srun and mpirun do not know of them.
            remove_buffers(int(os.environ["MASTER_PORT"]))


def _tell_of_thread(otherwise: Callable[[Any], object], place: Path, raised: Any) -> None:
    """Say in a line that a thread, of a tracker mostly, met a full disk: who waits for it meets it too, and ends."""
    from epi_ds.checkpoint.disk import disk_problem

    problem = None if raised.exc_value is None else disk_problem(raised.exc_value, place=place)
    if problem is None:
        otherwise(raised)
    else:
        logger.error("a thread has ended: %s", problem)


def _say_nothing(_: object) -> None:
    """Take what a thread or a handler of the end could not do."""


def _remedy(recipe: Recipe) -> str:
    """Say how a run goes on that lost a rank."""
    try:
        newest = RunFolder(Path(recipe.output)).complete_checkpoints()[-1:]
    except OSError as error:
        return f"Run the command again to go on from the newest checkpoint, which cannot be looked for now ({error})"
    last = f"the newest checkpoint is {newest[0].path}" if newest else "there is no checkpoint yet"
    return f"Run the command again to go on: {last}"
