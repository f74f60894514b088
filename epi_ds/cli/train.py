"""``epi-ds train``."""

from __future__ import annotations

from typing import Annotated

import typer

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
) -> None:
    """Fine-tune as a recipe says, with evolving isolation on ZeRO-3.

    Starts its ranks itself, unless it runs inside a launcher already. Continues where the run folder has a whole
    checkpoint, on any number of ranks.
    """
    from epi_ds.launch.environment import check_not_a_task, default_ranks, is_rank, prepare_environment
    from epi_ds.train.recipe import load_recipe

    prepare_environment()
    # Before any rank starts: everything that is wrong with the recipe, at once.
    loaded = load_recipe(recipe, overrides or [])
    if not is_rank():
        check_not_a_task()
        from epi_ds.launch.local import run_ranks

        arguments = ["train", recipe, *(overrides or []), f"--resume={resume}", *(["--restart"] if restart else [])]
        raise typer.Exit(run_ranks(MODULE, arguments, num_ranks=loaded.ranks or default_ranks()))

    import torch.distributed as dist

    from epi_ds.cli.report import show_run
    from epi_ds.train.run import run_recipe

    folder = run_recipe(loaded, restart=restart, resume_from=resume)
    if dist.get_rank() == 0:
        show_run(folder.root)
    dist.barrier()
    dist.destroy_process_group()
