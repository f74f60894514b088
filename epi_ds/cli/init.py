"""``epi-ds init``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from epi_ds.errors import UserError
from epi_ds.new_file import check_new, write_new


def init(
    model: Annotated[str | None, typer.Option(help="Folder of a Hugging Face model, or a hub id.")] = None,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="Rows to learn, in any known format.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs that will train; 0 trains on the CPU.")] = None,
    keep: Annotated[
        str | None, typer.Option(metavar="FILE", help="Old rows to replay; default: the model writes some itself.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="For a model without a chat template: a file, or a model that has one.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the stage and of the run; default: that of the rows.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe to write.")] = Path("recipe.yaml"),
) -> None:
    """Look at a model and at rows, and write a commented recipe by which it learns them and keeps what it could.

    Asks for what is not given, where there is a terminal. A file that exists is not overwritten.
    """
    check_new(output, parameter="--output")
    missing = [option for option, value in (("--model", model), ("--data", data), ("--gpus", gpus)) if value is None]
    is_asked = sys.stdin.isatty() and sys.stdout.isatty()
    if missing and not is_asked:
        raise UserError(f"{', '.join(missing)} must be given where there is no terminal to ask at")
    from epi_ds.launch.environment import num_accelerators, prepare_environment

    prepare_environment()
    from epi_ds.recipe.draft import Draft, sizes_of
    from epi_ds.train.first_look import checked_text, look_at_data, look_at_model

    found_model = look_at_model(model or typer.prompt("Model (a folder, or a hub id)"), what="--model")
    if not found_model.has_template and template is None:
        if not is_asked:
            raise UserError(
                f"--model {found_model.path} has no chat template; give --template, a file or a model that has one"
            )
        template = typer.prompt("Its tokenizer has no chat template; one from (a file, or a model that has one)")
    found_data = look_at_data(data or typer.prompt("Rows to learn (a file)"), say=typer.echo)
    if gpus is None:
        gpus = typer.prompt("GPUs that will train (0: the CPU)", default=num_accelerators(), type=int)
    if missing and keep is None:
        keep = typer.prompt("Old rows to replay (a file; nothing: the model writes some)", "", show_default=False)
    if missing and name is None:
        name = typer.prompt("Name of the stage and of the run", default=found_data.name)
    draft = Draft(
        model=found_model,
        data=found_data,
        name=name or found_data.name,
        num_gpus=gpus,
        keep=look_at_data(keep, say=typer.echo) if keep else None,
        template=template,
    )
    sizes = sizes_of(draft)
    write_new(output, checked_text(draft, sizes), parameter="--output")
    typer.echo(
        f"written {output}: about {sizes.num_steps} steps of {sizes.global_batch} rows, and {sizes.held_out} held out\n"
        "look at what will be learnt, then train:"
    )
    for verb in ("preview-data", "train"):
        typer.echo(f"  {shlex.join(['epi-ds', verb, str(output)])}")
