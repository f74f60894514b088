"""From importance to thresholds: what is compared, how much may be isolated, and whether the mask needs to change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from epi_ds.choices import ADAPTIVE, Memory, Protects, Selection
from epi_ds.config import EPIConfig, RatioSchedule
from epi_ds.isolation.importance.remembered import MAXIMUM, Remembered
from epi_ds.isolation.importance.stored import StoredImportance
from epi_ds.isolation.importance.tasks import Task, TaskScores
from epi_ds.isolation.importance.views import Favoured, Importance, Larger, Nothing, code_chunks, isolated_code_chunks
from epi_ds.isolation.layout import Layout
from epi_ds.isolation.placement import Placement
from epi_ds.isolation.schedule import ratio_at
from epi_ds.isolation.search.adaptive import Drift, covering_budgets, drift_of
from epi_ds.isolation.search.exchange import Exchange
from epi_ds.isolation.search.histogram_sketch import CodePiece, HistogramSketch
from epi_ds.isolation.search.sketch import Extremes, PartitionSketch, Piece, Sketch
from epi_ds.isolation.search.threshold import Preview, Thresholds, ThresholdSearch

# Scores of tasks are about 1 at the threshold.
_CODE_OF_ONE = 0x3F800000


class Candidates(NamedTuple):
    """What a selection compares."""

    importance: Importance
    """Without hysteresis: normalisers must not scale its advantage away, and release reads what was measured."""
    compared: Importance
    tasks: TaskScores | None = None
    """What ``importance`` is where it is of several tasks,"""
    extremes: Extremes | None = None
    """and its extremes."""


class Decision(NamedTuple):
    """What a look at the importance led to. The same on every rank."""

    ratio: float
    """The one that is, or would be, requested."""
    drift: Drift | None
    """Of the mask in force; None unless ``refresh_interval: adaptive``, and where nothing is isolated."""
    thresholds: Thresholds | None
    """None where the mask stays."""


def sketch_of(importance: Importance, layout: Layout) -> Sketch:
    """Return the sketch of a rank's covered entries."""
    num_layers = len(layout.layer_names)
    if isinstance(importance, StoredImportance) and importance.is_counted_by_code:
        pieces = [
            CodePiece(segment.layer, index, importance.stored(segment).codes)
            for index, segment in enumerate(layout.segments)
        ]
        return HistogramSketch(pieces, num_layers=num_layers, code_shift=importance.code_shift)
    return _sketch_of([partial(code_chunks, importance, segment) for segment in layout.segments], layout)


def _sketch_of(codes: Sequence[Callable[[], Iterable[Tensor]]], layout: Layout) -> PartitionSketch:
    """Return the sketch of one reader of codes per segment."""
    readers = enumerate(zip(layout.segments, codes, strict=True))
    pieces = [Piece(segment.layer, index, read) for index, (segment, read) in readers]
    return PartitionSketch(pieces, num_layers=len(layout.layer_names))


class Selector:
    """Searches thresholds as one configuration says. Keeps where the last search ended, and nothing per entry."""

    def __init__(self, placement: Placement, config: EPIConfig) -> None:
        self._placement, self._layout, self._config = placement, placement.layout, config
        self.last_row_codes: Tensor | None = None
        """`Thresholds.row_codes` of the last search, around which a preview is fine; saved with a checkpoint."""

    def candidates(
        self,
        importance: Importance,
        exchange: Exchange,
        *,
        remembered: Remembered,
        masks: Sequence[Tensor],
        step: int,
    ) -> Candidates:
        """Return what selection compares. Collective where several tasks share the budget.

        masks  bits in force, by sub-group
        step   applied steps so far
        """
        config = self._config
        if config.memory is Memory.STAGE_MAX:
            past = remembered.states[MAXIMUM]
            found = Candidates(*(past if config.protects is Protects.PAST else Larger(importance, past),) * 2)
        elif config.memory is Memory.PER_TASK:
            present = [] if config.protects is Protects.PAST else [Task(None, importance)]
            tasks = [*(Task(name, state) for name, state in remembered.tasks.items()), *present]
            if len(tasks) > 1:
                found = self._share(tasks, exchange, step)
            else:
                # One task has the whole budget: selected as it would be without memory.
                nothing = Nothing(self._placement, code_shift=importance.code_shift)
                found = Candidates(*(tasks[0].importance if tasks else nothing,) * 2)
        else:
            found = Candidates(importance, importance)
        if config.hysteresis == 1.0:
            return found
        # A copy of the list: its entries are replaced while the new masks are selected.
        return found._replace(compared=Favoured(found.importance, tuple(masks), config.hysteresis))

    def _share(self, tasks: Sequence[Task], exchange: Exchange, step: int) -> Candidates:
        """Return the scores of tasks. Collective. See [Note: shares] in tasks.py."""
        config, layout = self._config, self._layout
        num_layers = len(layout.layer_names)
        pieces = [
            Piece(index * num_layers + segment.layer, parameter, partial(code_chunks, task.importance, segment))
            for index, task in enumerate(tasks)
            for parameter, segment in enumerate(layout.segments)
        ]
        search = ThresholdSearch(
            PartitionSketch(pieces, num_layers=len(tasks) * num_layers),
            exchange,
            layer_numel=layout.layer_numel * len(tasks),
            selection=config.selection,
            normalizer=config.normalizer,
            code_shift=min(task.importance.code_shift for task in tasks),
            tasks=len(tasks),
        )
        ratio = config.max_ratio if isinstance(config.ratio, str) else self._ratio_at(config.ratio, step)
        scores = TaskScores(tasks, search.scale(search.budgets(ratio) // len(tasks)), self._placement)
        return Candidates(scores, scores, scores, scores.extremes(search.extremes))

    def sketch(self, importance: Importance) -> Sketch:
        """Return the sketch of this rank's covered entries."""
        return sketch_of(importance, self._layout)

    def decide(
        self,
        candidates: Candidates,
        exchange: Exchange,
        *,
        masks: Sequence[Tensor],
        isolated: int,
        step: int,
        may_stay: bool,
    ) -> Decision:
        """Search the thresholds of a new mask, unless it may stay and has not drifted. Collective.

        masks     bits in force, by sub-group, with ``isolated`` entries over all ranks
        step      applied steps so far
        may_stay  whether ``refresh_interval: adaptive`` may leave the mask as it is
        """
        config = self._config
        search = self._search(candidates, exchange)
        looks_at_drift = may_stay and config.refresh_interval == ADAPTIVE and isolated > 0
        preview: Preview | None = None
        if looks_at_drift or config.ratio == ADAPTIVE:
            pieces = [
                partial(isolated_code_chunks, candidates.compared, segment, masks[segment.sub_group])
                for segment in self._layout.segments
            ]
            preview = search.preview(_sketch_of(pieces, self._layout), near=self._near(candidates))
        elif candidates.tasks is not None and config.selection is not Selection.PER_LAYER:
            # It is known where the threshold lies, which saves a round.
            search.preview(None, near=self._near(candidates))
        ratio, budgets = self._budgets(search, preview, step=step)
        drift = None
        if preview is not None and looks_at_drift:
            drift = drift_of(preview, budgets=budgets, isolated=isolated)
            if max(drift.at_most, drift.growth) <= config.max_drift:
                return Decision(ratio, drift, None)
        thresholds = search.finish(budgets)
        self.last_row_codes = thresholds.row_codes
        return Decision(ratio, drift, thresholds)

    def _search(self, candidates: Candidates, exchange: Exchange) -> ThresholdSearch:
        config = self._config
        selection = config.selection
        if candidates.tasks is not None:
            # Normalised already.
            selection = selection if selection is Selection.PER_LAYER else Selection.RAW_GLOBAL
        # One sketch for both where they are the same: it may know already what it is asked.
        compared = self.sketch(candidates.compared)
        same = candidates.compared is candidates.importance
        return ThresholdSearch(
            compared,
            exchange,
            normalized_by=compared if same else self.sketch(candidates.importance),
            layer_numel=self._layout.layer_numel,
            selection=selection,
            normalizer=config.normalizer,
            code_shift=candidates.compared.code_shift,
            extremes=candidates.extremes,
        )

    def _near(self, candidates: Candidates) -> Tensor | None:
        """Return codes near the rows of the coming search, where any are known."""
        num_rows = len(self._layout.layer_names) if self._config.selection is Selection.PER_LAYER else 1
        # The selection may have changed since a checkpoint.
        if self.last_row_codes is not None and len(self.last_row_codes) == num_rows:
            return self.last_row_codes
        return None if candidates.tasks is None else torch.full((num_rows,), _CODE_OF_ONE)

    def _ratio_at(self, ratio: float | RatioSchedule, step: int) -> float:
        return ratio_at(ratio, step, warmup_steps=self._config.warmup_steps)

    def _budgets(self, search: ThresholdSearch, preview: Preview | None, *, step: int) -> tuple[float, Tensor]:
        """Return the ratio and what it allows, by the rows of the search."""
        config = self._config
        if not isinstance(config.ratio, str):
            ratio = self._ratio_at(config.ratio, step)
            return ratio, search.budgets(ratio)
        if preview is None:
            raise RuntimeError("ratio: adaptive without a preview")
        covering = covering_budgets(preview, coverage=config.coverage)
        budgets = torch.minimum(search.budgets(config.max_ratio), covering)
        return int(budgets.sum()) / self._layout.covered_numel, budgets
