"""One refresh: compare, preview, budget, search, select. Knows no schedule."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from epi_ds.choices import ADAPTIVE, Protects
from epi_ds.config import EPIConfig
from epi_ds.isolation.counters import Counters
from epi_ds.isolation.first_mask import FirstMask
from epi_ds.isolation.importance.remembered import Remembered
from epi_ds.isolation.importance.views import Importance
from epi_ds.isolation.layout import Segment
from epi_ds.isolation.mask import MaskListener, Masks
from epi_ds.isolation.placement import Placement
from epi_ds.isolation.refresh_report import Decision, Effort, MaskCounts, RefreshReport, drift_sentence, report_of
from epi_ds.isolation.search.budget import find_budget
from epi_ds.isolation.search.collectives import GroupExchange
from epi_ds.isolation.search.compare import Comparison, compare
from epi_ds.isolation.search.preview import take_preview
from epi_ds.isolation.search.sketches import sketch_of
from epi_ds.isolation.search.threshold import Thresholds

logger = logging.getLogger(__name__)


class Refresher:
    """Owns the masks of one rank's partitions, and what refreshes remember of one another."""

    def __init__(
        self, placement: Placement, config: EPIConfig, *, exchange: GroupExchange, listener: MaskListener | None
    ) -> None:
        self._layout, self._config = placement.layout, config
        self._exchange, self._listener = exchange, listener
        self.masks = Masks(placement)
        self.isolated = 0
        """Isolated entries over all ranks; the same on every rank."""
        self.first_mask = FirstMask()
        self.threshold_codes: Tensor | None = None
        """[num_layers] int64 on the CPU; None before the first refresh."""
        self.last_row_codes: Tensor | None = None
        """`Thresholds.row_codes` of the last search, around which a preview is fine; saved with a checkpoint."""
        self.last_refresh: RefreshReport | None = None
        self.last_decision: Decision | None = None
        self._group_isolated = torch.zeros(len(placement.layout.group_numel), dtype=torch.int64)

    def load(self, mask_of: Callable[[Segment], Tensor]) -> None:
        """Put given masks in force: [real_numel] bool of every segment. `add_up` is due then, on every rank."""
        self._group_isolated = self.masks.load(mask_of)

    def add_up(self) -> None:
        """Count the isolated entries of all ranks, once each has loaded its masks. Collective."""
        self._set_isolated(self._exchange.total(self._group_isolated))

    def refresh(
        self, measured: Importance, *, remembered: Remembered, counters: Counters, may_stay: bool
    ) -> RefreshReport | None:
        """Select new masks, unless they may stay and have not drifted. Collective; returns None where they stay.

        measured    the importance of now
        remembered  that of finished stages
        may_stay    whether ``refresh_interval: adaptive`` may leave the masks as they are
        """
        config, exchange, masks, step = self._config, self._exchange, self.masks, counters.applied_steps
        started, traffic, before = time.perf_counter(), exchange.traffic, self._group_isolated
        staying = self.isolated if may_stay and config.refresh_interval == ADAPTIVE else 0

        comparison = compare(measured, remembered, masks, config=config, exchange=exchange, step=step)
        preview = take_preview(comparison, masks, config=config, near=self.last_row_codes, staying=staying)
        budget = find_budget(
            comparison.search, preview, config=config, step=step, staying=staying, asked=comparison.asked
        )
        thresholds = None if budget.mask_stays else comparison.search.finish(budget.entries)
        self._decide(Decision(budget.ratio, budget.drift, thresholds), step)
        if thresholds is None:
            return None
        isolated, kept = masks.select(comparison.compared, thresholds.codes, measured=measured, listener=self._listener)

        first, overlaps = self.first_mask.compare(masks.bits), comparison.overlaps(thresholds.codes)
        counts = MaskCounts(isolated, kept, first, overlaps).total(exchange, self._layout)
        self._set_isolated(counts.isolated)
        if self.isolated:
            self.first_mask.keep(masks.bits)
        self.threshold_codes, self.last_row_codes = thresholds.codes, thresholds.row_codes
        if config.protects is not Protects.PAST or counters.finished_stages:
            # Without a past nothing is isolated, as configured.
            self._warn_if_blocked(comparison, thresholds, ratio=budget.ratio, step=step)
        effort = Effort(time.perf_counter() - started, exchange.traffic.since(traffic))
        self.last_refresh = report_of(
            comparison, thresholds, counts, before, ratio=budget.ratio, counters=counters, effort=effort
        )
        return self.last_refresh

    def _set_isolated(self, by_group: Tensor) -> None:
        """Note the isolated entries of all ranks. [num_groups] int64, CPU."""
        self._group_isolated = by_group
        self.isolated = int(by_group[: len(self._layout.layer_names)].sum())

    def _decide(self, decision: Decision, step: int) -> None:
        """Note a decision, and say what an adaptive run decided, and why."""
        self.last_decision = decision
        sentence = drift_sentence(decision, self._config)
        if sentence is not None and self._exchange.rank == 0:
            logger.info("after step %d: %s", step, sentence)

    def _warn_if_blocked(self, comparison: Comparison, thresholds: Thresholds, *, ratio: float, step: int) -> None:
        """Warn when ties keep most of the budget unused, and name the layer to look at. Collective where it warns."""
        if thresholds.budget == 0 or self.isolated >= thresholds.budget / 2:
            return
        largest = thresholds.extremes.max_codes.clamp(min=1).unsqueeze(1)
        at_maximum = self._exchange.total(sketch_of(comparison.importance, self._layout).counts(largest)[:, 0])
        layer = int(at_maximum.argmax())
        if self._exchange.rank == 0:
            logger.warning(
                "refresh after step %d isolated %d entries of the %d that ratio %s allows; layer %r has %d entries at "
                "its maximum, and equal entries are isolated together or not at all",
                step,
                self.isolated,
                thresholds.budget,
                ratio,
                self._layout.layer_names[layer],
                int(at_maximum[layer]),
            )
