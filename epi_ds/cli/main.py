"""The ``epi-ds`` command."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Annotated

import typer

import epi_ds
from epi_ds.cli import (
    audit,
    bench,
    checkpoints,
    configs,
    demo,
    doctor,
    estimate,
    export,
    launch,
    operators,
    recipes,
    report,
    train,
)
from epi_ds.errors import CheckpointError, LostRankError, UserError

# Packages that only training by a recipe and its report need: the extra `train`.
_OF_THE_EXTRA = ("accelerate", "datasets", "matplotlib", "trl")

app = typer.Typer(
    name="epi-ds",
    help="Fine-tune large language models without making them forget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"epi-ds {epi_ds.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True, help="Given by the deepspeed launcher.")] = 0,
) -> None:
    """Fine-tune large language models without making them forget."""
    # The rank is read from the environment; the launcher passes this on top unless it is told not to.


app.command("train")(train.train)
app.add_typer(launch.app, name="launch")
app.command("demo")(demo.demo)
app.command("audit")(audit.audit)
app.add_typer(bench.app, name="bench")
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(configs.app, name="configs")
app.command("export")(export.export)
app.command("estimate")(estimate.estimate)
app.command("report")(report.report)
app.command("recipes")(recipes.recipes)
app.command("build-operators")(operators.build_operators)
app.command("doctor")(doctor.doctor)


def _quieten() -> None:
    """Leave the terminal to what the user asked for."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("epi_ds").setLevel(logging.INFO)
    # Addressed to the authors of the libraries below us, and repeated at every collective and every evaluation.
    warnings.simplefilter("ignore", FutureWarning)


def main() -> None:
    """Run the command; a user's mistake (exit code 2), a bad checkpoint and a lost rank (1) are told in a message."""
    _quieten()
    try:
        app(standalone_mode=True)
    except UserError as error:
        # Every rank meets the same mistake; one says it.
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except CheckpointError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if "RANK" in os.environ:
            raise
        # A full disk, say, or a folder that is a file.
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        if error.name not in _OF_THE_EXTRA:
            raise
        needs = f"epi-ds {' '.join(sys.argv[1:2])} needs {error.name}, which is not installed here"
        print(f"error: {needs}: pip install 'epi-ds[train]'", file=sys.stderr)
        sys.exit(2)
    except LostRankError as error:
        # Whichever ranks are left.
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
