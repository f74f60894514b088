"""``epi-ds preview-data``."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from epi_ds.train.preview import SourcePreview, StagePreview

_BAR_WIDTH = 40


def preview_data(
    recipe: Annotated[str, typer.Argument(help="A .yaml file, or the name of a shipped recipe (epi-ds recipes).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, as epi-ds train takes them.")
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows of every stage to show.")] = 2,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks that will train; default those of the recipe.")
    ] = None,
) -> None:
    """Show what a recipe would train on: rows as the chat template writes them, what the loss is on, lengths, tokens,
    and rows that are cut or left out.

    Prepares the rows as a run does, which then finds them. Needs no GPU, and the model's tokenizer only.
    """
    from epi_ds.launch.environment import prepare_environment

    prepare_environment()
    from epi_ds.recipe.loading import load_recipe
    from epi_ds.train.preview import preview

    loaded = load_recipe(recipe, overrides or [])
    console = Console(soft_wrap=True, highlight=False)
    found = preview(loaded, ranks=ranks or loaded.ranks or 1, num_samples=rows)
    for stage in found.stages:
        _show(stage, console)
    if found.kept:
        console.rule("what is kept")
    for source in found.kept:
        _show_source(source, console)


def _show(stage: StagePreview, console: Console) -> None:
    console.rule(f"stage {stage.name}")
    for source in stage.sources:
        _show_source(source, console)
    replayed = f" with {stage.num_replayed} replayed rows" if stage.num_replayed else ""
    console.print(
        f"{stage.num_steps} steps{replayed}, and {stage.left_over} rows left over (the last, incomplete batch)"
    )


def _show_source(source: SourcePreview, console: Console) -> None:
    summary = source.summary
    for level, text in summary.told:
        console.print(f"{logging.getLevelName(level).lower()}: {text}", markup=False)
    packed = f", packed into {source.num_rows}" if source.num_rows != summary.num_rows else ""
    share = summary.num_learnt / max(summary.num_tokens, 1)
    console.print(
        f"{source.name}: {summary.num_rows} rows{packed}; {summary.num_tokens} tokens, the loss is on "
        f"{summary.num_learnt} of them ({share:.0%}); {summary.num_cut} rows cut, {summary.num_unlearnt} left out "
        "because their answers were",
        markup=False,
    )
    most = max(summary.lengths, default=0)
    console.print("tokens of a row, before any was cut:")
    for power, count in enumerate(summary.lengths):
        if count:
            bar = "#" * max(1, round(_BAR_WIDTH * count / most))
            console.print(f"  {1 << power >> 1:>8} to {(1 << power) - 1:<8} {count:>9}  {bar}")
    for number, sample in enumerate(source.samples, 1):
        console.print(f"\nrow {number}, the loss is on what stands between brackets:", style="bold")
        shown = Text()
        for stretch in sample:
            shown.append(
                f"[[{stretch.text}]]" if stretch.is_learnt else stretch.text, "green" if stretch.is_learnt else ""
            )
        console.print(shown)
