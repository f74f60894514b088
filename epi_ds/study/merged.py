"""The model between a base and what was trained of it, as the end of a cell's run (WiSE-FT, arXiv 2109.01903)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from epi_ds.inspect.merge import merge_models
from epi_ds.recipe.models import Recipe
from epi_ds.train.run_folder import RunFolder
from epi_ds.train.score_folder import score_folder, wanted_by


class Merged(NamedTuple):
    """The model that a cell is scored by, and where its scores are."""

    folder: Path
    lines: Sequence[Mapping[str, Any]]
    """As a run's metrics are: with the evaluations before training and at the end."""


def merged(run: RunFolder, recipe: Recipe, base: Path, *, alpha: float, metrics: Sequence[Mapping[str, Any]]) -> Merged:
    """Write the model between a base and a run's, and score it as the run's end.

    alpha    share of what was trained
    metrics  the run's lines

    Raises what `merge_models` and `score_folder` raise.
    """
    folder = run.root / "merged"
    # Of an attempt that did not come to its line.
    shutil.rmtree(folder, ignore_errors=True)
    merge_models(base, run.export, folder, alpha=alpha)
    ends = [line for line in metrics if line["event"] == "evaluation" and line["stage_ended"]]
    # What tasks of lm-evaluation-harness say is not compared.
    scores = score_folder(str(folder), wanted_by(recipe)._replace(harness=None), what="the merged model")
    end = {**ends[-1], "scores": {name: one._asdict() for name, one in scores.items()}}
    return Merged(folder, (ends[0], end))
