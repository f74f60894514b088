"""The ``epi-ds`` command."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from enum import Enum
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
    evaluate,
    export,
    launch,
    merge,
    operators,
    preview_data,
    recipes,
    report,
    study,
    train,
    validate,
)
from epi_ds.errors import CheckpointError, DiskError, LostRankError, RemedyError, UserError
from epi_ds.launch.teardown import skip_teardown

# Packages that only training by a recipe and its report need, and only a study or general ability, with their extras.
_OF_EXTRAS = {
    **dict.fromkeys(("accelerate", "datasets", "matplotlib", "trl"), "train"),
    "scipy": "study",
    "lm_eval": "eval",
}

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
app.command("validate")(validate.validate)
app.command("preview-data")(preview_data.preview_data)
app.add_typer(launch.app, name="launch")
app.command("demo")(demo.demo)
app.command("audit")(audit.audit)
app.add_typer(bench.app, name="bench")
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(configs.app, name="configs")
app.command("eval")(evaluate.evaluate)
app.command("export")(export.export)
app.command("merge")(merge.merge)
app.command("estimate")(estimate.estimate)
app.command("report")(report.report)
app.command("recipes")(recipes.recipes)
app.add_typer(study.app, name="study")
app.command("build-operators")(operators.build_operators)
app.command("doctor")(doctor.doctor)


def _quieten() -> None:
    """Leave the terminal to what the user asked for."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("epi_ds").setLevel(logging.INFO)
    # Addressed to the authors of the libraries below us, and repeated at every collective and every evaluation.
    warnings.simplefilter("ignore", FutureWarning)


class _Speaks(Enum):
    """Who tells the user of an error."""

    RANK_0 = "rank 0"
    """Every rank meets the same one."""
    EVERYONE = "everyone"
    """Whichever ranks are left."""
    NO_RANK = "no rank"
    """Outside of ranks a folder that is a file, say; within them it is a traceback. Of a disk `DiskError` tells."""


# Errors whose message is all there is to say, with the exit code they end in.
_TOLD: dict[type[Exception], tuple[int, _Speaks]] = {
    UserError: (2, _Speaks.RANK_0),
    CheckpointError: (1, _Speaks.RANK_0),
    # Before its base, which all ranks raise.
    DiskError: (1, _Speaks.EVERYONE),
    RemedyError: (1, _Speaks.RANK_0),
    LostRankError: (1, _Speaks.EVERYONE),
    OSError: (1, _Speaks.NO_RANK),
}


def main() -> None:
    """Run the command; an error of `_TOLD` is a message and an exit code, and no traceback.

    A rank ends with its exit code, and not with what threads of its process group make of it (teardown.py).
    """
    _quieten()
    try:
        _run()
    except SystemExit as end:
        _end_rank(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
    except Exception:
        _end_rank(1)
        raise


def _end_rank(exit_code: int) -> None:
    if "RANK" in os.environ:
        skip_teardown(exit_code)


def _run() -> None:
    try:
        app(standalone_mode=True)
    except tuple(_TOLD) as error:
        code, speaks = next(told for kind, told in _TOLD.items() if isinstance(error, kind))
        rank = os.environ.get("RANK")
        if speaks is _Speaks.NO_RANK and rank is not None:
            raise
        if speaks is not _Speaks.RANK_0 or rank in (None, "0"):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(code)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _OF_EXTRAS:
            raise
        needs = f"epi-ds {' '.join(sys.argv[1:2])} needs {package}, which is not installed here"
        print(f"error: {needs}: pip install 'epi-ds[{_OF_EXTRAS[package]}]'", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
