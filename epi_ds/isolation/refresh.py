"""One refresh: select the masks, put them in force, and report what was found. Knows no schedule."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from epi_ds.choices import ADAPTIVE, Protects
from epi_ds.config import EPIConfig
from epi_ds.isolation.counters import Counters
from epi_ds.isolation.importance.remembered import Remembered
from epi_ds.isolation.importance.tasks import task_shares
from epi_ds.isolation.importance.views import Importance, ReadPartition, partition_reader
from epi_ds.isolation.layout import Segment
from epi_ds.isolation.mask import Masks, select_bits
from epi_ds.isolation.placement import Placement
from epi_ds.isolation.refresh_report import FirstMask, GroupCounts, Refresh, layer_importance
from epi_ds.isolation.search.bracket import count_dtype
from epi_ds.isolation.search.collectives import GroupExchange
from epi_ds.isolation.search.compare import Candidates, Decision, Selector
from epi_ds.isolation.search.threshold import Thresholds

logger = logging.getLogger(__name__)


class MaskListener(Protocol):
    """Told about every partition whose mask a refresh changes, before the new mask is in force. Masks that are loaded
    come with the moments that belong to them.
    """

    def mask_changes(self, sub_group: int, *, before: Tensor, now: Tensor, importance: ReadPartition) -> None:
        """``before`` and ``now`` are uint8 bits of the sub-group's flat partition, which ``importance`` reads."""


class _Changed(NamedTuple):
    """Counts of a change of masks over all ranks."""

    isolated: Tensor
    """[num_groups] int64: by layer, then by kind"""
    kept: Tensor
    both_first: int
    """Sampled entries isolated now and in the first mask of the run."""
    either_first: int
    overlaps: Tensor
    """[tasks, tasks] int64, see `TaskScores.overlaps`; empty where no tasks share the budget."""


class Refresher:
    """Owns the masks of one rank's partitions, and what refreshes remember of one another."""

    def __init__(
        self,
        placement: Placement,
        config: EPIConfig,
        *,
        exchange: GroupExchange,
        listener: MaskListener | None,
    ) -> None:
        self._placement, self._layout, self._config = placement, placement.layout, config
        self._exchange, self._listener = exchange, listener
        self.masks = Masks(placement)
        self.isolated = 0
        """Isolated entries over all ranks; the same on every rank."""
        self.selector = Selector(placement, config)
        self.first_mask = FirstMask()
        self.threshold_codes: Tensor | None = None
        """[num_layers] int64 on the CPU; None before the first refresh."""
        self.last_refresh: Refresh | None = None
        self.last_decision: Decision | None = None
        self._group_isolated = torch.zeros(len(placement.layout.group_numel), dtype=torch.int64)

    def load(self, mask_of: Callable[[Segment], Tensor]) -> None:
        """Put given masks in force: [real_numel] bool of every segment. `add_up` is due then, on every rank."""
        self._group_isolated = self.masks.load(mask_of)

    def add_up(self) -> None:
        """Count the isolated entries of all ranks, once each has loaded its masks. Collective."""
        self._group_isolated = self._exchange.total(self._group_isolated)
        self.isolated = int(self._group_isolated[: len(self._layout.layer_names)].sum())

    def refresh(
        self, importance: Importance, *, remembered: Remembered, counters: Counters, may_stay: bool
    ) -> Refresh | None:
        """Select new masks, unless they may stay and have not drifted. Collective; returns None where they stay."""
        started, traffic = time.perf_counter(), self._exchange.traffic
        masks, step = self.masks.bits, counters.applied_steps
        candidates = self.selector.candidates(importance, self._exchange, remembered=remembered, masks=masks, step=step)
        decision = self.selector.decide(
            candidates, self._exchange, masks=masks, isolated=self.isolated, step=step, may_stay=may_stay
        )
        self.last_decision = decision
        self._log(decision, step)
        thresholds = decision.thresholds
        if thresholds is None:
            return None
        found = self._change_masks(importance, candidates, thresholds.codes)
        before, self._group_isolated = self._group_isolated, found.isolated
        layout, num_layers = self._layout, len(self._layout.layer_names)
        columns = layout.group_numel, found.isolated.tolist(), found.kept.tolist(), before.tolist()
        names = (*layout.layer_names, *layout.kind_names)
        groups = tuple(GroupCounts(*row) for row in zip(names, *columns, strict=True))
        self.isolated = sum(group.isolated for group in groups[:num_layers])
        if self.isolated:
            self.first_mask.keep(masks)
        self.threshold_codes = thresholds.codes
        if self._config.protects is not Protects.PAST or counters.finished_stages:
            # Without a past nothing is isolated, as configured.
            self._warn_if_blocked(candidates, thresholds, ratio=decision.ratio, step=step)
        self.last_refresh = Refresh(
            step=step,
            ratio=decision.ratio,
            budget=thresholds.budget,
            isolated=self.isolated,
            covered=layout.covered_numel,
            tied_mass=thresholds.tied_mass,
            layers=groups[:num_layers],
            kinds=groups[num_layers:],
            importance=layer_importance(
                thresholds.codes, thresholds.extremes, tuple(segment.name for segment in layout.segments)
            ),
            tasks=() if candidates.tasks is None else task_shares(candidates.tasks.names, found.overlaps),
            jaccard_first=found.both_first / found.either_first if found.either_first else None,
            held_gradient_energy=counters.mean_held_gradient_energy,
            held_step_energy=counters.mean_held_step_energy,
            seconds=time.perf_counter() - started,
            collectives=self._exchange.traffic.collectives - traffic.collectives,
            sent_bytes=self._exchange.traffic.sent_bytes - traffic.sent_bytes,
        )
        return self.last_refresh

    def _change_masks(self, importance: Importance, candidates: Candidates, threshold_codes: Tensor) -> _Changed:
        """Select, announce and install the masks of all sub-groups; return the counts over all ranks. Collective."""
        num_groups = len(self._layout.group_numel)
        counts = torch.zeros((2, num_groups), dtype=torch.int64)
        tasks = candidates.tasks
        overlaps = torch.zeros((0, 0), dtype=torch.int64) if tasks is None else tasks.overlaps(threshold_codes)
        for sub_group, segments in enumerate(self._layout.by_sub_group):
            before = self.masks.bits[sub_group]
            selected = select_bits(
                candidates.compared,
                before,
                segments=segments,
                threshold_codes=threshold_codes,
                groups_of=self._layout.groups_of,
                num_groups=num_groups,
            )
            if self._listener is not None:
                self._listener.mask_changes(
                    sub_group,
                    before=before,
                    now=selected.bits,
                    importance=partition_reader(importance, segments, self._placement.devices[sub_group]),
                )
            self.masks.replace(sub_group, selected)
            counts += selected.counts
        parts = counts.flatten(), self.first_mask.compare(self.masks.bits), overlaps.flatten()
        largest = self._layout.covered_numel if len(overlaps) else max(self._layout.group_numel)
        merged = self._exchange.total(torch.cat(parts).to(count_dtype(largest))).long()
        groups, first, pairs = torch.split(merged, [part.numel() for part in parts])
        return _Changed(groups[:num_groups], groups[num_groups:], int(first[0]), int(first[1]), pairs.view_as(overlaps))

    def _warn_if_blocked(self, candidates: Candidates, thresholds: Thresholds, *, ratio: float, step: int) -> None:
        """Warn when ties keep most of the budget unused, and name the layer to look at. Collective where it warns."""
        if thresholds.budget == 0 or self.isolated >= thresholds.budget / 2:
            return
        largest = thresholds.extremes.max_codes.clamp(min=1).unsqueeze(1)
        at_maximum = self._exchange.total(self.selector.sketch(candidates.importance).counts(largest)[:, 0])
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

    def _log(self, decision: Decision, step: int) -> None:
        """Say what an adaptive run decided, and why."""
        config = self._config
        if self._exchange.rank != 0 or (decision.drift is None and config.ratio != ADAPTIVE):
            return
        reasons = []
        if decision.drift is not None:
            low, high, growth = decision.drift
            verdict = "stays" if decision.thresholds is None else "is refreshed"
            reasons.append(
                f"{low:.1%} to {high:.1%} of the isolated entries lie below the threshold of now, and a new mask would "
                f"be larger by {growth:.1%} of it (max_drift {config.max_drift:.1%}): the mask {verdict}"
            )
        if config.ratio == ADAPTIVE:
            reasons.append(f"ratio {decision.ratio:.4%} holds {config.coverage:.0%} of the importance")
        logger.info("after step %d: %s", step, "; ".join(reasons))
