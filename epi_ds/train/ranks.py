"""The life of a recipe's ranks: their start on this machine, a lost one, and their end."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from epi_ds.errors import LostRankError
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
    """Train as one of the ranks, and have this process end where Python would be torn down.

    show  called on rank 0 with the folder of a run that was trained

    Raises UserError for a tracker that is not installed, and LostRankError where another rank dies or stands still.
    """
    check_installed(trackers_in(recipe.train.get("report_to")))
    if recipe.ranks not in (None, int(os.environ["WORLD_SIZE"])) and os.environ["RANK"] == "0":
        logger.warning("ranks: %d is ignored, because %s were started", recipe.ranks, os.environ["WORLD_SIZE"])
    import torch.distributed as dist

    from epi_ds.launch.local import remove_buffers
    from epi_ds.launch.lost_ranks import die_with_launcher, lost_rank
    from epi_ds.launch.teardown import skip_teardown
    from epi_ds.train.run import run_recipe

    die_with_launcher()
    try:
        folder = run_recipe(recipe, start)
        if folder is not None and dist.get_rank() == 0:
            show(folder.root)
        dist.barrier()
        dist.destroy_process_group()
        skip_teardown(0)
    except RuntimeError as error:
        if (reason := lost_rank(error)) is None:
            raise
        raise LostRankError(f"rank {os.environ['RANK']}: {reason}. {_remedy(recipe)}") from error
    finally:
        if os.environ["LOCAL_RANK"] == "0":
            # srun and mpirun do not know of them.
            remove_buffers(int(os.environ["MASTER_PORT"]))


def _remedy(recipe: Recipe) -> str:
    """Say how a run goes on that lost a rank."""
    newest = RunFolder(Path(recipe.output)).complete_checkpoints()[-1:]
    last = f"the newest checkpoint is {newest[0].path}" if newest else "there is no checkpoint yet"
    return f"Run the command again to go on: {last}"
