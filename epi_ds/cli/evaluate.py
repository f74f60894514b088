"""``epi-ds eval``: general ability of a model in a folder, by the tasks of lm-evaluation-harness."""

from __future__ import annotations

import gc
import json
import os
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import torch

    from epi_ds.evaluation.harness.harness import Harness
    from epi_ds.evaluation.scores import Score
    from epi_ds.recipe.harness import HarnessSection


class _Scores(NamedTuple):
    """What one model scores."""

    model: str
    tasks: dict[str, Score]


def evaluate(
    folder: Annotated[str, typer.Argument(help="Folder of a Hugging Face model, such as RUN/export, or a hub id.")],
    tasks: Annotated[str, typer.Option(help="Names of tasks, groups or tags, with commas between them.")],
    against: Annotated[str | None, typer.Option(metavar="BASE", help="Score this model too; show both.")] = None,
    include_path: Annotated[str | None, typer.Option(help="Folder of task files of your own.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="First rows of every task; 0 for all of them.")] = 200,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Solved examples; default what a task says.")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Most tokens; default the model's.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Most rows of a batch.")] = 32,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Ask in the model's chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Score a model by tasks of lm-evaluation-harness, as `evaluation.lm_eval` of a recipe does within a run.

    One process on one device: the accelerator, or the CPU where there is none. It needs the extra eval.
    """
    from epi_ds.launch.environment import prepare_environment

    prepare_environment()
    section = _section(
        tasks=tuple(filter(None, (name.strip() for name in tasks.split(",")))),
        include_path=include_path,
        limit=limit or None,
        num_fewshot=num_fewshot,
        max_length=max_length,
        apply_chat_template=chat_template,
    )
    from epi_ds.evaluation.harness.harness import Harness
    from epi_ds.evaluation.harness.surroundings import disable_loading_bars

    disable_loading_bars()
    # The cheap things first: a task that there is not is told before a large model is read.
    harness = Harness(section)
    scored = [_scored(folder, harness, what="FOLDER", batch_size=batch_size)]
    if against is not None:
        scored.append(_scored(against, harness, what="--against", batch_size=batch_size))
    if as_json:
        typer.echo(json.dumps(_as_values(scored)))
    else:
        Console().print(_rendered(scored))


def _section(**values: Any) -> HarnessSection:
    """Return the options as a recipe would have them. Raises UserError for all that is wrong with them, at once."""
    from pydantic import ValidationError

    from epi_ds.errors import UserError, problems_of, summarize
    from epi_ds.recipe.harness import HarnessSection

    try:
        return HarnessSection(**values)
    except ValidationError as error:
        raise UserError(summarize(problems_of(error, HarnessSection), place="the options of epi-ds eval")) from error


def _scored(path: str, harness: Harness, *, what: str, batch_size: int) -> _Scores:
    """Load a model, score it and let it go."""
    import torch
    from transformers import AutoTokenizer

    from epi_ds.evaluation.harness.held import HeldModel
    from epi_ds.evaluation.room import most_scored_tokens
    from epi_ds.evaluation.scores import Scored
    from epi_ds.recipe.models import ModelSection
    from epi_ds.train.model import load_model, told

    console = Console(stderr=True)
    with console.status(f"loading {path}") as status, torch.inference_mode():
        with told(path, what=what):
            tokenizer = AutoTokenizer.from_pretrained(path)
        device = _device()
        model = load_model(ModelSection(path=path), what=what).to(device).eval()

        def show(scored: Scored) -> None:
            status.update(f"{path}: {scored.done}/{scored.total} requests, {scored.seconds:.0f} s")

        held = HeldModel(
            model,
            tokenizer,
            device,
            gathered=True,
            batch_size=batch_size,
            batch_tokens=most_scored_tokens(model.config),
            show=show,
        )
        scores = harness.score(held)
    # Before the next one is read.
    del model, held
    gc.collect()
    return _Scores(path, scores)


def _device() -> torch.device:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    return accelerator


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
        metric = f"{score.metric}{'' if score.higher_is_better else ', less is better'}"
        table.add_row(name.partition("/")[2], metric, str(score.num_rows), *values)
    return table


def _shown(value: float, score: Score, sign: str = "") -> str:
    """Return a share in percent, and anything else as it is."""
    return f"{value:{sign}.1%}" if score.higher_is_better else f"{value:{sign}.4f}"
