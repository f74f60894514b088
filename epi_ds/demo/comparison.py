"""Both ways of the demo side by side: what each learnt, what it kept, and how far its weights went."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from safetensors.torch import load_file

from epi_ds.checkpoint.weights_folder import SINGLE
from epi_ds.errors import UserError
from epi_ds.recipe.models import Recipe
from epi_ds.train.metrics import read_metrics
from epi_ds.train.run_folder import RunFolder


class TaskScores(NamedTuple):
    """Accuracies of one task: of the base, and at the end of either way."""

    name: str
    before: float
    plain: float
    protected: float


class Comparison(NamedTuple):
    """What two runs of the same stages from the same base came to."""

    learnt: tuple[TaskScores, ...]
    """The stages' tasks."""
    kept: tuple[TaskScores, ...]
    """What the base could before, and no stage trains."""
    distance: float
    """Euclidean, of the protected run's weights from the base's, over that of the plain run's."""


class Point(NamedTuple):
    """A model in the plane."""

    name: str
    learnt: float
    kept: float


def compare(recipe: Recipe, *, base: Path, plain: Path, protected: Path) -> Comparison:
    """Read both runs of a recipe, which are finished, and the base that they began with.

    Raises UserError where overrides of the recipe left a task without its accuracy.
    """
    runs = RunFolder(plain), RunFolder(protected)
    (before, plain_scores), (_, protected_scores) = (_first_and_last(run.metrics) for run in runs)

    def scores_of(name: str) -> TaskScores:
        if name not in before:
            raise UserError(f"the demo compares accuracies, and {name} has none; leave the evaluation of it as it is")
        return TaskScores(name, before[name], plain_scores[name], protected_scores[name])

    distances = [_distance(base, run.export) for run in runs]
    return Comparison(
        learnt=tuple(scores_of(stage.name) for stage in recipe.stages),
        kept=tuple(scores_of(skill) for skill in recipe.evaluation.skills),
        distance=distances[1] / distances[0],
    )


def mean_scores(name: str, rows: tuple[TaskScores, ...]) -> TaskScores:
    """Return the means of some tasks."""
    return TaskScores(name, *(fmean(values) for values in list(zip(*rows, strict=True))[1:]))


def points_of(comparison: Comparison) -> tuple[Point, Point, Point]:
    """Return the base, and where either way led."""
    learnt, kept = (mean_scores("", rows) for rows in (comparison.learnt, comparison.kept))
    return (
        Point("base", learnt.before, kept.before),
        Point("plain", learnt.plain, kept.plain),
        Point("protected", learnt.protected, kept.protected),
    )


def _first_and_last(metrics: Path) -> list[dict[str, float]]:
    """Return the accuracies before training and at a run's end, by task."""
    lines = [line for line in read_metrics(metrics) if line["event"] == "evaluation"]
    return [
        {name: float(score["value"]) for name, score in line["scores"].items() if score["higher_is_better"]}
        for line in (lines[0], lines[-1])
    ]


def _distance(base: Path, other: Path) -> float:
    first, second = (load_file(folder / SINGLE) for folder in (base, other))
    return math.sqrt(sum(float((second[name].double() - first[name].double()).square().sum()) for name in first))
