"""``epi-ds eval``: what a model in a folder can, by a recipe or by tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from epi_ds.evaluation.scores import Score
    from epi_ds.recipe.harness import HarnessSection
    from epi_ds.train.score_folder import Wanted

_ROWS = 200
_BATCH = 32
# What options are called, where settings are called otherwise.
_OPTIONS = {"apply_chat_template": "chat_template"}


class _Scores(NamedTuple):
    """What one model scores."""

    model: str
    tasks: dict[str, Score]


def evaluate(
    folder: Annotated[str, typer.Argument(help="Folder of a Hugging Face model, such as RUN/export, or a hub id.")],
    recipe: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Score it by what this recipe evaluates; or give --tasks.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Names of tasks of lm-evaluation-harness, groups or tags, with commas.")
    ] = None,
    against: Annotated[str | None, typer.Option(metavar="BASE", help="Score this model too; show both.")] = None,
    include_path: Annotated[str | None, typer.Option(help="Folder of task files of your own.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=0, help="First rows of every task; 0 for all of them.", show_default="200")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Solved examples; default what a task says.")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Most tokens; default the model's.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Most rows of a batch; default the recipe's, or 32.")
    ] = None,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Ask in the model's chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Score a model by what a recipe evaluates, or by tasks of lm-evaluation-harness, as a run does.

    `epi-ds eval MERGED --recipe my.yaml --against BASE` says what a merged model learnt and kept. One process on one
    device: the accelerator, or the CPU where there is none. Tasks of lm-evaluation-harness need the extra eval.
    """
    from epi_ds.launch.environment import prepare_environment

    prepare_environment()
    from epi_ds.evaluation.harness.surroundings import disable_loading_bars

    disable_loading_bars()
    of_tasks = {
        "include_path": include_path,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "max_length": max_length,
        "apply_chat_template": chat_template or None,
    }
    # The cheap things first: a task that there is not is told before a large model is read.
    wanted = _wanted(recipe, tasks, {key: value for key, value in of_tasks.items() if value is not None}, batch_size)
    scored = [_scored(folder, wanted, what="FOLDER")]
    if against is not None:
        scored.append(_scored(against, wanted, what="--against"))
    if as_json:
        typer.echo(json.dumps(_as_values(scored)))
    else:
        Console().print(_rendered(scored))


def _wanted(recipe: str | None, tasks: str | None, options: dict[str, Any], batch_size: int | None) -> Wanted:
    """Return what is scored. Raises UserError where both or neither can say it, and for what nobody would read."""
    from epi_ds.errors import UserError

    if recipe is not None and tasks is None:
        if options:
            given = ", ".join(f"--{_OPTIONS.get(key, key).replace('_', '-')}" for key in options)
            raise UserError(f"{given}: of a recipe, evaluation.lm_eval says it; remove it here, or set it there")
        return _of_recipe(recipe, batch_size)
    if tasks is not None and recipe is None:
        return _of_tasks(tasks, options, batch_size)
    raise UserError(
        "a model is scored by what a recipe evaluates (--recipe) or by tasks of lm-evaluation-harness (--tasks), and "
        f"{'neither is' if recipe is None else 'both are'} given; give one of them"
    )


def _of_recipe(recipe: str, batch_size: int | None) -> Wanted:
    from epi_ds.errors import UserError
    from epi_ds.recipe.loading import load_recipe
    from epi_ds.train.score_folder import wanted_by

    found = wanted_by(load_recipe(recipe))
    if not found.tasks and found.harness is None:
        raise UserError(
            f"the recipe {recipe} evaluates nothing: its stages have no evaluation, and evaluation.tasks, skills and "
            "lm_eval name none; add one of them, or give --tasks"
        )
    return found if batch_size is None else found._replace(batch_size=batch_size)


def _of_tasks(tasks: str, options: dict[str, Any], batch_size: int | None) -> Wanted:
    from epi_ds.train.score_folder import Wanted

    # A name that there is not is told before torch is imported.
    section = _section(
        **{
            **options,
            "tasks": tuple(filter(None, (name.strip() for name in tasks.split(",")))),
            # 0 is all rows.
            "limit": options.get("limit", _ROWS) or None,
        }
    )
    from epi_ds.evaluation.harness.harness import Harness

    return Wanted(None, (), Harness(section), batch_size or _BATCH)


def _section(**values: Any) -> HarnessSection:
    """Return the options as a recipe would have them. Raises UserError for all that is wrong with them, at once."""
    from pydantic import ValidationError

    from epi_ds.errors import UserError, problems_of, summarize
    from epi_ds.recipe.harness import HarnessSection

    try:
        return HarnessSection(**values)
    except ValidationError as error:
        raise UserError(summarize(problems_of(error, HarnessSection), place="the options of epi-ds eval")) from error


def _scored(path: str, wanted: Wanted, *, what: str) -> _Scores:
    """Score one model, and say how far it has come."""
    from epi_ds.evaluation.scores import Scored
    from epi_ds.train.score_folder import score_folder

    with Console(stderr=True).status(f"loading {path}") as status:

        def show(scored: Scored) -> None:
            status.update(f"{path}: {scored.task} {scored.done}/{scored.total}, {scored.seconds:.0f} s")

        return _Scores(path, score_folder(path, wanted, what=what, show=show))


def _as_values(scored: list[_Scores]) -> dict[str, Any]:
    one, *others = (
        {"model": found.model, "tasks": {name: score._asdict() for name, score in found.tasks.items()}}
        for found in scored
    )
    if not others:
        return one
    return {**one, "against": others[0], "difference": {name: _difference(scored, name) for name in scored[0].tasks}}


def _difference(scored: list[_Scores], name: str) -> float:
    return scored[0].tasks[name].value - scored[1].tasks[name].value


def _rendered(scored: list[_Scores]) -> Table:
    table = Table("task", "metric", "rows", *(found.model for found in scored))
    if len(scored) > 1:
        table.add_column("difference")
    for name, score in scored[0].tasks.items():
        values = [_shown(found.tasks[name].value, score) for found in scored]
        if len(scored) > 1:
            values.append(_shown(_difference(scored, name), score, sign="+"))
        metric = score.metric or ("accuracy" if score.higher_is_better else "loss of a token")
        metric += "" if score.higher_is_better else ", less is better"
        table.add_row(name.removeprefix("lm_eval/"), metric, str(score.num_rows), *values)
    return table


def _shown(value: float, score: Score, sign: str = "") -> str:
    """Return a share in percent, and anything else as it is."""
    return f"{value:{sign}.1%}" if score.higher_is_better else f"{value:{sign}.4f}"
