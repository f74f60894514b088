"""The first step of a refresh: which importance a selection compares, of now, of finished stages, or of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from epi_ds.choices import Memory, PolicyName, Protects, Selection
from epi_ds.config import EPIConfig
from epi_ds.isolation.importance.remembered import Remembered
from epi_ds.isolation.importance.tasks import TaskImportance, TaskScores
from epi_ds.isolation.importance.views import Favoured, Importance, Larger, Nothing
from epi_ds.isolation.layout import Layout
from epi_ds.isolation.mask import Masks
from epi_ds.isolation.placement import Placement
from epi_ds.isolation.policies.half import ChosenHalf
from epi_ds.isolation.policies.inverted import least_important
from epi_ds.isolation.policies.momentum import SmallestMomenta
from epi_ds.isolation.schedule import ratio_at
from epi_ds.isolation.search.exchange import Exchange
from epi_ds.isolation.search.sketch import Extremes
from epi_ds.isolation.search.sketches import sketch_of, sketch_of_tasks
from epi_ds.isolation.search.threshold import SearchPlan, ThresholdSearch
from epi_ds.policy_rules import UNMEASURED


class Comparison(NamedTuple):
    """What a selection compares, and the search that has begun for its thresholds."""

    importance: Importance
    """Without hysteresis: normalisers must not scale its advantage away."""
    compared: Importance
    """The same, with entries that are isolated now favoured as ``hysteresis`` says."""
    tasks: TaskScores | None
    """What ``importance`` is where several tasks share the budget."""
    search: ThresholdSearch
    layout: Layout
    asked: int | None = None
    """Entries to isolate, where what is compared says so and ``ratio`` does not."""

    def overlaps(self, threshold_codes: Tensor) -> Tensor:
        """Return `TaskScores.overlaps`, or ``[0, 0]`` int64 where no tasks share the budget."""
        return torch.zeros((0, 0), dtype=torch.int64) if self.tasks is None else self.tasks.overlaps(threshold_codes)


def compare(
    measured: Importance,
    remembered: Remembered,
    masks: Masks,
    *,
    config: EPIConfig,
    exchange: Exchange,
    step: int,
) -> Comparison:
    """Return what a selection after ``step`` applied steps compares. Collective: the layers' extremes are exchanged.

    measured    the importance of now
    remembered  that of finished stages
    masks       those in force
    """
    placement, layout = masks.placement, masks.placement.layout
    tasks, extremes = None, None
    if config.policy in UNMEASURED:
        # What is remembered is importance, and these rank by something else: it is there for an anchor.
        importance: Importance = measured
    elif config.memory is Memory.PER_TASK:
        known = _tasks(measured, remembered, config)
        if len(known) > 1:
            tasks, extremes = _share(known, placement, config=config, exchange=exchange, step=step)
            importance = tasks
        else:
            # One task has the whole budget: selected as it would be without memory.
            nothing = Nothing(placement, code_shift=measured.code_shift)
            importance = known[0].importance if known else nothing
    elif config.memory is Memory.STAGE_MAX and config.protects is Protects.PAST:
        importance = remembered.maximum
    elif config.memory is Memory.STAGE_MAX and not remembered.is_empty:
        importance = Larger(remembered.comparable(measured, exchange), remembered.maximum)
    else:
        importance = measured
    if config.policy is PolicyName.INVERTED:
        importance = least_important(importance, layout, config=config, exchange=exchange)
    elif config.policy is PolicyName.MOMENTUM:
        importance = SmallestMomenta(importance)
    compared = importance
    if config.hysteresis != 1.0:
        # A copy of the list: its entries are replaced while the new masks are selected.
        compared = Favoured(importance, tuple(masks.bits), config.hysteresis)
    # One sketch for both where they are the same: it may know already what it is asked.
    sketch = sketch_of(compared, layout)
    plan = SearchPlan(
        layer_numel=layout.layer_numel,
        selection=config.selection,
        normalizer=config.normalizer,
        code_shift=compared.code_shift,
    )
    has_scores = tasks is not None or config.policy is PolicyName.INVERTED
    if has_scores and config.selection is Selection.NORMALIZED_GLOBAL:
        # Scores are normalised already.
        plan = plan._replace(selection=Selection.RAW_GLOBAL)
    normalized_by = sketch if compared is importance else sketch_of(importance, layout)
    search = ThresholdSearch(sketch, exchange, plan, normalized_by=normalized_by, extremes=extremes)
    asked = measured.entries if isinstance(measured, ChosenHalf) else None
    return Comparison(importance, compared, tasks, search, layout, asked)


def _tasks(measured: Importance, remembered: Remembered, config: EPIConfig) -> list[TaskImportance]:
    """Return the tasks that are protected: those of finished stages, and the running one unless it is left out."""
    past = [TaskImportance(name, state) for name, state in remembered.tasks.items()]
    return past if config.protects is Protects.PAST else [*past, TaskImportance(None, measured)]


def _share(
    tasks: Sequence[TaskImportance], placement: Placement, *, config: EPIConfig, exchange: Exchange, step: int
) -> tuple[TaskScores, Extremes]:
    """Return the scores of tasks, and their extremes over all ranks. Collective. See [Note: shares] in tasks.py."""
    layout, importances = placement.layout, [task.importance for task in tasks]
    plan = SearchPlan(
        layer_numel=layout.layer_numel * len(tasks),
        selection=config.selection,
        normalizer=config.normalizer,
        code_shift=min(importance.code_shift for importance in importances),
        tasks=len(tasks),
    )
    search = ThresholdSearch(sketch_of_tasks(importances, layout), exchange, plan)
    ratio = config.ratio
    largest = config.max_ratio if isinstance(ratio, str) else ratio_at(ratio, step, warmup_steps=config.warmup_steps)
    scores = TaskScores(tasks, search.scale(search.budgets(largest) // len(tasks)), placement)
    return scores, scores.extremes(search.extremes)
