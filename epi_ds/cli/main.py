"""The ``epi-ds`` command."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from enum import Enum
from typing import Annotated

import typer

import epi_ds
from epi_ds.cli import (
    audit,
    bench,
    chat,
    checkpoints,
    configs,
    demo,
    doctor,
    estimate,
    evaluate,
    export,
    init,
    inspect,
    launch,
    merge,
    operators,
    preview_data,
    push,
    recipes,
    report,
    schema,
    study,
    train,
    validate,
    watch,
)
from epi_ds.cli.debugging import OPTION, log_everything, log_traceback
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
    epilog="Start with: epi-ds demo, then epi-ds init",
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
    debug: Annotated[
        bool,
        typer.Option(OPTION, callback=log_everything, help="Show where an error comes from, too: its traceback."),
    ] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True, help="Given by the deepspeed launcher.")] = 0,
) -> None:
    """Fine-tune large language models without making them forget."""
    # The rank is read from the environment; the launcher passes this on top unless it is told not to.


def _verb(name: str, function: Callable[..., None], panel: str, *, example: str) -> None:
    app.command(name, rich_help_panel=panel, epilog=f"Example: {example}")(function)


def _family(name: str, verbs: typer.Typer, panel: str, *, example: str) -> None:
    app.add_typer(verbs, name=name, rich_help_panel=panel, epilog=f"Example: {example}")


_BEFORE, _DURING, _AFTER, _MEASURED = "Before a run", "During a run", "After a run", "Studies and measurements"

_verb("doctor", doctor.doctor, _BEFORE, example="epi-ds doctor /scratch/me/runs")
_verb("build-operators", operators.build_operators, _BEFORE, example="epi-ds build-operators")
_verb("demo", demo.demo, _BEFORE, example="epi-ds demo --output runs/demo")
_verb("init", init.init, _BEFORE, example="epi-ds init --model Qwen/Qwen2-7B-Instruct --data train.jsonl --gpus 8")
_family("recipes", recipes.app, _BEFORE, example="epi-ds recipes cp own_data mine.yaml")
_family("configs", configs.app, _BEFORE, example="epi-ds configs cp zero3_offload mine.json")
_verb("schema", schema.schema, _BEFORE, example="epi-ds schema > recipe.schema.json")
_verb("validate", validate.validate, _BEFORE, example="epi-ds validate recipe.yaml --ranks 64 --dry-run")
_verb("preview-data", preview_data.preview_data, _BEFORE, example="epi-ds preview-data recipe.yaml --rows 5")
_verb("estimate", estimate.estimate, _BEFORE, example="epi-ds estimate --world-size 1024 --layers 300")
_verb("train", train.train, _DURING, example="epi-ds train recipe.yaml train.learning_rate=2e-5")
_verb("watch", watch.watch, _DURING, example="epi-ds watch runs/mine")
_family("launch", launch.app, _DURING, example="epi-ds launch local recipe.yaml --ranks 8")
_verb("report", report.report, _AFTER, example="epi-ds report runs/plain runs/mine -o page.html")
_verb("inspect", inspect.inspect, _AFTER, example="epi-ds inspect runs/mine --picture isolated.png")
_verb("audit", audit.audit, _AFTER, example="epi-ds audit runs/mine")
_verb("eval", evaluate.evaluate, _AFTER, example="epi-ds eval runs/mine/export --recipe recipe.yaml --against base")
_verb("chat", chat.chat, _AFTER, example="epi-ds chat runs/mine --against-base")
_verb("export", export.export, _AFTER, example="epi-ds export runs/mine/checkpoints/checkpoint-40 out --verify")
_verb("merge", merge.merge, _AFTER, example="epi-ds merge base runs/mine/export --output between --alpha 0.5")
_verb("push", push.push, _AFTER, example="epi-ds push runs/mine me/my-model --dry-run")
_family("checkpoints", checkpoints.app, _AFTER, example="epi-ds checkpoints list runs/mine")
_family("study", study.app, _MEASURED, example="epi-ds study table tiny")
_family("bench", bench.app, _MEASURED, example="epi-ds bench kernels --device cuda")


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
    """Run the command; an error of `_TOLD` is a message and an exit code, and no traceback but with ``--debug``.

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
            log_traceback()
            print(f"error: {error}", file=sys.stderr)
        sys.exit(code)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _OF_EXTRAS:
            raise
        log_traceback()
        verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        needs = f"epi-ds {verb} needs {package}, which is not installed here"
        print(f"error: {needs}: pip install 'epi-ds[{_OF_EXTRAS[package]}]'", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
