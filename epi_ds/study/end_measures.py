"""What is measured of a cell once its run has ended, beside its scores: from its metrics, its model and its base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from epi_ds.data.conversation import Message
from epi_ds.errors import CheckpointError, RemedyError
from epi_ds.evaluation.tasks import stage_task
from epi_ds.recipe.models import Recipe
from epi_ds.study.conflict import Ends, conflicts_of
from epi_ds.study.divergence import kl_to_base
from epi_ds.study.gradients import GradientMeter, SkillGradients
from epi_ds.study.mask_drift import mask_drift_of
from epi_ds.study.sensitivity import last_importance, sensitivities_of
from epi_ds.train.run_folder import RunFolder

# Of gradients, as many at both ends: cosines of more rows have less noise in them, and lie farther from 0. Squares of
# so many batches correlate at .93 with those of as many others, in ranks, on a base that has half learnt its skills.
_BATCHES = 8
# Bases of which gradients are remembered: cells of one seed come one after another, of as many targets as there are.
_BASES = 4


class Finished(NamedTuple):
    """A run that has ended, and what it began with."""

    run: RunFolder
    recipe: Recipe
    base: Path
    trained: Path
    """The model that is scored."""
    is_made: bool
    """Whether the study made the base: of larger models gradients are not measured here."""
    base_skills: tuple[str, ...]
    """What the base could and no stage trains."""

    @property
    def new(self) -> str | None:
        """The built-in skill that the last stage trains; None for other rows."""
        return self.recipe.stages[-1].skill

    @property
    def kept(self) -> tuple[str, ...]:
        """The built-in skills that it may have forgotten: those of earlier stages, and the base's."""
        earlier = [stage.skill for stage in self.recipe.stages[:-1] if stage.skill not in {None, self.new}]
        return tuple(dict.fromkeys(skill for skill in (*earlier, *self.base_skills) if skill is not None))


def measures_of(finished: Finished, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what explains a run's scores, by the names of a result's fields.

    metrics  the run's lines

    Raises RemedyError where a checkpoint of the run cannot be read.
    """
    found: dict[str, Any] = {"mask_drift": mask_drift_of(metrics)}
    new, run = finished.new, finished.run
    if conversations := _new_task(finished.recipe):
        found["kl_to_base"] = kl_to_base(finished.base, finished.trained, conversations)
    if not finished.is_made or not finished.kept:
        return found
    of_base = _gradients_of_base(finished.base, (*finished.kept, *((new,) if new is not None else ())))
    if new is not None:
        meter = GradientMeter(finished.trained)
        of_trained = {skill: meter.of(skill, batches=_BATCHES) for skill in (new, *finished.kept)}
        found["conflict"] = conflicts_of(Ends(of_base, of_trained), new=new, kept=finished.kept)
    try:
        importance = last_importance(run.checkpoints, step=metrics[-1]["step"])
    except CheckpointError as error:
        raise RemedyError(f"the importance that the run ended with cannot be read: {error}") from error
    if importance is not None:
        found["sensitivity"] = sensitivities_of(importance, {skill: of_base[skill] for skill in finished.kept})
    return found


def _new_task(recipe: Recipe) -> list[tuple[Message, ...]]:
    """Return test rows of what the last stage trains; none where it has none, or texts without prompts."""
    task = stage_task(recipe.stages[-1], recipe)
    found = [] if task is None else task.conversations[: recipe.evaluation.rows]
    return [row.messages for row in found if row.messages]


@lru_cache(maxsize=_BASES)
def _gradients_of_base(base: Path, skills: tuple[str, ...]) -> dict[str, SkillGradients]:
    meter = GradientMeter(base)
    return {skill: meter.of(skill, batches=_BATCHES) for skill in skills}
