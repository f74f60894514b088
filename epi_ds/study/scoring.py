"""The two scores of a run, read from its metrics: what it learnt, and what it kept.

Under ``one_new_task`` ``new`` is the accuracy on the new task, and ``kept`` the mean accuracy on the base's skills,
both at the run's end. Under ``stages`` ``new`` is the mean over stages of the accuracy right after the own stage, and
``kept`` the mean, at the run's end, over all stages but the last and the base's skills.

A task that is scored by its loss of a token counts as a likelihood, so that every score is in [0, 1]: in ``new`` as
exp(-loss), the geometric mean of what the model gives the tokens of the reference, and among what the base could as
exp(loss before training - loss), the share that is left of it, at most 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from epi_ds.errors import RemedyError
from epi_ds.recipe.keep import BASE
from epi_ds.study.flips import flips_between
from epi_ds.study.measures import Flips
from epi_ds.study.models import Protocol
from epi_ds.study.result_lines import PathPoint


class Scored(NamedTuple):
    """What a finished run is worth."""

    new: float
    kept: float
    new_before: float
    kept_before: float
    forgetting_rate: float | None
    backward_transfer: float | None
    path: tuple[PathPoint, ...]
    scores: dict[str, tuple[float, ...]]
    flips: dict[str, Flips]


class _Score(NamedTuple):
    value: float
    is_accuracy: bool
    solved: str | None

    @property
    def worth(self) -> float:
        """In [0, 1]."""
        return self.value if self.is_accuracy else math.exp(-self.value)

    def left_of(self, before: _Score) -> float:
        """Return what is left of what the base could, in [0, 1]."""
        return self.value if self.is_accuracy else math.exp(min(0.0, before.value - self.value))


class _Evaluation(NamedTuple):
    step: int
    scores: dict[str, _Score]


def scores_of(
    metrics: Iterable[Mapping[str, Any]], *, protocol: Protocol, stages: Sequence[str], kept: Sequence[str]
) -> Scored:
    """Return both scores of a run.

    metrics  its lines
    stages   names of its stages, in order
    kept     names of what the base can that they do not train

    Raises RemedyError where an evaluation is missing, or a task in it.
    """
    lines = [line for line in metrics if line["event"] == "evaluation"]
    evaluations = [_evaluation(line) for line in lines]
    ends = [found for found, line in zip(evaluations, lines, strict=True) if line["stage_ended"]]
    if len(ends) != len(stages) + 1:
        raise RemedyError(
            f"the run has {len(ends)} evaluations of the {len(stages) + 1} before training and at the ends of stages; "
            "see its log, and run the cell again"
        )
    for name in (*stages, *kept):
        if any(name not in found.scores for found in evaluations):
            raise RemedyError(f"{name} was not scored; give it an evaluation")
    before, *after = ends
    earlier = stages[:-1] if protocol is Protocol.STAGES else ()

    def base_left(at: _Evaluation) -> list[float]:
        return [at.scores[name].left_of(before.scores[name]) for name in kept]

    def kept_at(at: _Evaluation) -> float:
        return fmean([*(at.scores[name].worth for name in earlier), *base_left(at)])

    path: tuple[PathPoint, ...] = ()
    if protocol is Protocol.ONE_NEW_TASK:
        path = tuple(PathPoint(step=at.step, new=at.scores[stages[0]].worth, kept=kept_at(at)) for at in evaluations)
    last = after[-1]
    own = [at.scores[name].worth for name, at in zip(stages, after, strict=True)]
    transfers = [last.scores[name].worth - score for name, score in zip(stages[:-1], own, strict=False)]
    lost = [(had - left) / had for had, left in zip(base_left(before), base_left(last), strict=True) if had > 0]
    return Scored(
        new=fmean(own),
        kept=kept_at(last),
        new_before=fmean(before.scores[name].worth for name in stages),
        kept_before=kept_at(before),
        forgetting_rate=fmean(lost) if lost else None,
        backward_transfer=fmean(transfers) if transfers else None,
        path=path,
        scores={name: tuple(at.scores[name].value for at in ends) for name in (*stages, *kept)},
        flips={
            name: flips
            for name in (*stages, *kept)
            if (flips := flips_between(before.scores[name].solved, last.scores[name].solved)) is not None
        },
    )


def _evaluation(line: Mapping[str, Any]) -> _Evaluation:
    """Return the scores of a line. A skill that is given to be kept is scored as one of ``base/``."""
    scores = {
        # Earlier commits did not write which rows were solved.
        name.removeprefix(f"{BASE}/"): _Score(float(one["value"]), one["higher_is_better"], one.get("solved"))
        for name, one in line["scores"].items()
    }
    return _Evaluation(line["step"], scores)
