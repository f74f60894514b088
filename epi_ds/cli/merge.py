"""``epi-ds merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

_IMPORTANCE = "importance"


def merge(
    first: Annotated[Path, typer.Argument(metavar="A", help="Folder of a Hugging Face model, before fine-tuning.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Folder of the same model after it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")],
    alpha: Annotated[float, typer.Option(help="Share of B, in [0, 1]: 0 is A, 1 is B.")] = 0.5,
    weights: Annotated[
        tuple[str, Path] | None,
        typer.Option(
            metavar="importance CHECKPOINT",
            help="Weigh entries by the importance in a checkpoint of the run that made B.",
        ),
    ] = None,
) -> None:
    """Write the model between two of one architecture, a tensor at a time. Needs no rank and no GPU."""
    from epi_ds.launch.environment import prepare_environment

    prepare_environment()
    from epi_ds.inspect.merge import merge_models
    from epi_ds.inspect.merge_weights import FisherWeights

    if weights is not None and weights[0] != _IMPORTANCE:
        raise typer.BadParameter(f"{weights[0]!r} is not {_IMPORTANCE}", param_hint="--weights")
    found = merge_models(
        first, second, output, alpha=alpha, weights=None if weights is None else FisherWeights(weights[1])
    )
    console = Console(soft_wrap=True, highlight=False)
    for path in found.files:
        console.print(f"written {path}")
    how = "" if weights is None else f", {found.weighted} of them weighted by importance"
    console.print(f"{found.num_tensors} tensors, {found.num_bytes / 1e9:.3f} GB{how}")
