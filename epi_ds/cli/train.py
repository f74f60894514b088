"""``epi-ds train``."""

from __future__ import annotations

from typing import Annotated

import typer

from epi_ds.cli.debugging import debug_options


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
    from epi_ds.launch import stop_signals
    from epi_ds.launch.environment import prepare_environment
    from epi_ds.launch.rank_environment import become_rank

    is_rank = become_rank() is not None
    if is_rank:
        # Before what takes seconds, in which a signal would end this rank, and with it all others.
        stop_signals.listen()
    prepare_environment()
    from epi_ds.cli.report import show_trained
    from epi_ds.recipe.loading import load_recipe
    from epi_ds.train.ranks import start_ranks, train_as_rank
    from epi_ds.train.start import Start

    # Before any rank starts: everything that is wrong with the options and the recipe, at once.
    start = Start(restart, resume, until)
    loaded = load_recipe(recipe, overrides or [])
    start = start.of(loaded)
    if is_rank:
        train_as_rank(loaded, start, show=show_trained)
    else:
        raise typer.Exit(start_ranks(loaded, [*debug_options(), "train", recipe, *(overrides or []), *start.arguments]))
