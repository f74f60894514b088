"""The two scores of a run, read from its metrics: what it learnt, and what it kept.

Under ``one_new_task`` ``new`` is the accuracy on the new task, and ``kept`` the mean accuracy on the base's skills,
both at the run's end. Under ``stages`` ``new`` is the mean over stages of the accuracy right after the own stage, and
``kept`` the mean, at the run's end, over all stages but the last and the base's skills.
"""

from __future__ import annotations

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


class _Evaluation(NamedTuple):
    step: int
    scores: dict[str, float]
    solved: dict[str, str | None]


def scores_of(
    metrics: Iterable[Mapping[str, Any]], *, protocol: Protocol, stages: Sequence[str], kept: Sequence[str]
) -> Scored:
    """Return both scores of a run.

    metrics  its lines
    stages   names of its stages, in order
    kept     the base's skills that they do not train

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
            raise RemedyError(f"{name} was not scored by its accuracy; give its stage an evaluation that is")
    before, *after = ends
    last = after[-1].scores
    own = [found.scores[name] for name, found in zip(stages, after, strict=True)]
    remembered = [*stages[:-1], *kept] if protocol is Protocol.STAGES else list(kept)
    path: tuple[PathPoint, ...] = ()
    if protocol is Protocol.ONE_NEW_TASK:
        path = tuple(
            PathPoint(step=one.step, new=one.scores[stages[0]], kept=fmean(one.scores[name] for name in kept))
            for one in evaluations
        )
    transfers = [last[name] - score for name, score in zip(stages[:-1], own, strict=False)]
    lost = [(before.scores[name] - last[name]) / before.scores[name] for name in kept if before.scores[name] > 0]
    return Scored(
        new=fmean(own),
        kept=fmean(last[name] for name in remembered),
        new_before=fmean(before.scores[name] for name in stages),
        kept_before=fmean(before.scores[name] for name in remembered),
        forgetting_rate=fmean(lost) if lost else None,
        backward_transfer=fmean(transfers) if transfers else None,
        path=path,
        scores={name: tuple(found.scores[name] for found in ends) for name in (*stages, *kept)},
        flips={
            name: flips
            for name in (*stages, *kept)
            if (flips := flips_between(before.solved[name], after[-1].solved[name])) is not None
        },
    )


def _evaluation(line: Mapping[str, Any]) -> _Evaluation:
    """Return the accuracies of a line. A skill that is given to be kept is scored as one of ``base/``."""
    scores = {
        name.removeprefix(f"{BASE}/"): score for name, score in line["scores"].items() if score["higher_is_better"]
    }
    return _Evaluation(
        line["step"],
        {name: float(score["value"]) for name, score in scores.items()},
        # Earlier commits did not write which rows were solved.
        {name: score.get("solved") for name, score in scores.items()},
    )
