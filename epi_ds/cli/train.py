"""``epi-ds train``."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from epi_ds.errors import LostRankError, UserError

if TYPE_CHECKING:
    from epi_ds.recipe.models import Recipe

logger = logging.getLogger(__name__)

MODULE = "epi_ds.cli.main"


def train(
    recipe: Annotated[str, typer.Argument(help="A .yaml file, or the name of a shipped recipe (epi-ds recipes).")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value with dotted keys, e.g. train.max_length=512 stages.0.epochs=2"),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what the run folder holds.")] = False,
    resume: Annotated[
        str, typer.Option(help="auto: the newest checkpoint that is whole; or step:N; or a checkpoint's name.")
    ] = "auto",
    until: Annotated[str | None, typer.Option(help="Save and stop after the stage of this name.")] = None,
) -> None:
    """Fine-tune as a recipe says, with evolving isolation on ZeRO-3.

    Starts its ranks itself, unless it is one: of the deepspeed launcher, torchrun, srun or mpirun. Continues where the
    run folder has a whole checkpoint, on any number of ranks. SIGTERM, SIGUSR1 and Ctrl-C make it save and stop, with
    exit code 85.
    """
    if restart and resume != "auto":
        raise UserError(f"--restart throws away what --resume {resume} would continue from; give one of them")
    from epi_ds.launch import stop_signals
    from epi_ds.launch.environment import prepare_environment
    from epi_ds.launch.rank_environment import become_rank

    is_rank = become_rank() is not None
    if is_rank:
        # Before what takes seconds, in which a signal would end this rank, and with it all others.
        stop_signals.listen()
    prepare_environment()
    from epi_ds.recipe.loading import load_recipe

    # Before any rank starts: everything that is wrong with the recipe, at once.
    loaded = load_recipe(recipe, overrides or [])
    if is_rank:
        _train(loaded, restart=restart, resume=resume, until=until)
        return
    options = [f"--resume={resume}", *([f"--until={until}"] if until else []), *(["--restart"] if restart else [])]
    raise typer.Exit(start_ranks(loaded, ["train", recipe, *(overrides or []), *options]))


def start_ranks(recipe: Recipe, arguments: list[str], *, num_ranks: int | None = None) -> int:
    """Run ``epi-ds`` with these arguments in ranks of this machine; return the exit code.

    num_ranks  None for as many as the recipe says

    Raises LostRankError where a rank was killed.
    """
    from epi_ds.launch.environment import default_ranks
    from epi_ds.launch.local import run_ranks
    from epi_ds.launch.lost_ranks import OF_A_DEATH, signal_of

    exit_code = run_ranks(MODULE, arguments, num_ranks=num_ranks or recipe.ranks or default_ranks())
    if number := signal_of(exit_code):
        raise LostRankError(f"a rank or the launcher was ended by {number.name}. {OF_A_DEATH}. {_remedy(recipe)}")
    return exit_code


def _train(recipe: Recipe, *, restart: bool, resume: str, until: str | None) -> None:
    """Train as one of the ranks. Raises LostRankError where another one dies or stands still."""
    if recipe.ranks not in (None, int(os.environ["WORLD_SIZE"])) and os.environ["RANK"] == "0":
        logger.warning("ranks: %d is ignored, because %s were started", recipe.ranks, os.environ["WORLD_SIZE"])
    import torch.distributed as dist

    from epi_ds.cli.report import show_run
    from epi_ds.launch.local import remove_buffers
    from epi_ds.launch.lost_ranks import die_with_launcher, lost_rank
    from epi_ds.launch.teardown import skip_teardown
    from epi_ds.train.run import run_recipe

    die_with_launcher()
    try:
        folder = run_recipe(recipe, restart=restart, resume_from=resume, until=until)
        if folder is not None and dist.get_rank() == 0:
            show_run(folder.root)
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
    from epi_ds.train.run_folder import RunFolder

    newest = RunFolder(Path(recipe.output)).complete_checkpoints()[-1:]
    last = f"the newest checkpoint is {newest[0].path}" if newest else "there is no checkpoint yet"
    return f"Run the command again to go on: {last}"
