"""When importance is observed, when masks are refreshed, and what a refresh found. Knows no DeepSpeed.

[Note: when] The mask of a window is fixed before the window's first backward: a refresh after applied step t selects
the mask in force from step t + 1 on, so norm, clipping and offload copies of one step all see the same mask.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from epi_ds.config import ADAPTIVE, EPIConfig, Memory, PolicyName, Protects, StateFormat
from epi_ds.isolation.bracket import count_dtype
from epi_ds.isolation.collectives import GroupExchange
from epi_ds.isolation.counters import Counters
from epi_ds.isolation.layout import Layout, Segment
from epi_ds.isolation.mask import Masks, select_bits
from epi_ds.isolation.policy import Policy
from epi_ds.isolation.refresh import FirstMask, GroupCounts, Refresh, layer_importance
from epi_ds.isolation.remembered import Remembered
from epi_ds.isolation.schedule import largest_ratio
from epi_ds.isolation.selector import Candidates, Decision, Selector
from epi_ds.isolation.state import (
    Importance,
    ReadPartition,
    StoredImportance,
    partition_reader,
)
from epi_ds.isolation.tasks import task_shares
from epi_ds.isolation.threshold import Thresholds
from epi_ds.kernels import Stored

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


class IsolationController:
    """Owns the importance and the masks of one rank's partitions."""

    def __init__(
        self,
        layout: Layout,
        config: EPIConfig,
        *,
        policy: Policy,
        exchange: GroupExchange,
        devices: Sequence[torch.device],
        listener: MaskListener | None = None,
        moments: Importance | None = None,
    ) -> None:
        """``devices`` are the home devices of the sub-groups' fp32 partitions; ``moments`` are the optimizer's second
        moments, for ``state: adam`` to read.
        """
        self.layout = layout
        self.config = config
        self.exchange = exchange
        self.counters = Counters()
        self.last_refresh: Refresh | None = None
        self.threshold_codes: Tensor | None = None
        self.first_mask = FirstMask()
        self.last_decision: Decision | None = None
        self._selector = Selector(layout, config, devices=devices)
        self.isolated = 0
        self._policy = policy
        self._listener = listener
        self._devices = list(devices)
        self._moments = moments
        self._stored: StoredImportance | None = None
        self._remembered = Remembered(layout, config, devices=devices)
        self.masks = Masks(layout, devices=devices)
        self._group_isolated = torch.zeros(len(layout.group_numel), dtype=torch.int64)
        if policy.observes(1):
            self.start_measuring()

    # --- state ---

    def start_measuring(self) -> None:
        """Allocate zero importance, if there is none yet and it is ours to keep."""
        config = self.config
        if self._stored is None and config.state is not StateFormat.ADAM:
            self._stored = StoredImportance(
                self.layout, config.state, devices=self._devices, seed=config.seed, purpose="importance"
            )

    def stop_measuring(self) -> None:
        """Free the importance."""
        self._stored = None

    @property
    def states(self) -> dict[str, StoredImportance]:
        """Everything per entry that is ours beside the masks: ``importance`` where it is measured and not the
        optimizer's, and what is remembered of finished stages (see `Remembered.states`).
        """
        own = {} if self._stored is None else {"importance": self._stored}
        return own | self._remembered.states

    @property
    def observes(self) -> bool:
        """Whether the gradient of the step about to be applied enters importance of our own."""
        return self._stored is not None and self._policy.observes(self.counters.applied_steps + 1)

    @property
    def awaits_probe(self) -> bool:
        """Whether the mask of a static policy is still to come from a probe; the same on every rank."""
        config = self.config
        wants_one = config.policy is PolicyName.STATIC and config.probe_steps is not None and largest_ratio(config) > 0
        return wants_one and self.counters.refreshes == 0 and not self.is_active

    @property
    def is_active(self) -> bool:
        """Whether any rank has an isolated entry; the same on every rank."""
        return self.isolated > 0

    def is_active_here(self, sub_group: int) -> bool:
        """Whether this rank's partition of the sub-group has an isolated entry."""
        return self.masks.isolated_here[sub_group] > 0

    def _importance(self) -> Importance:
        importance = self._stored if self._stored is not None else self._moments
        if importance is None:
            raise RuntimeError(f"there is no importance: policy {self.config.policy.value} does not measure it")
        return importance

    def segment_importance(self, segment: Segment) -> Tensor:
        """Return this rank's slice of a parameter's importance. [real_numel] fp32, not to be written to.

        Raises RuntimeError where nothing is measured.
        """
        return self._importance().read(segment, 0, segment.real_numel)

    @property
    def last_row_codes(self) -> Tensor | None:
        """See `Selector.last_row_codes`."""
        return self._selector.last_row_codes

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes on this rank of each of `states`, of the masks and of the sample of the first one."""
        sizes = {name: state.num_bytes for name, state in self.states.items()}
        sample = sum(bits.numel() for bits in self.first_mask.sample)
        return {**sizes, "masks": self.masks.num_bytes, "first_mask": sample}

    def restore(
        self,
        *,
        counters: Counters,
        threshold_codes: Tensor | None,
        masks: Mapping[str, Tensor],
        states: Mapping[str, Mapping[str, Stored]],
        first_mask: Sequence[Tensor] = (),
        last_row_codes: Tensor | None = None,
    ) -> None:
        """Replace the whole state by slices of this rank's segments, by parameter name. Collective.

        masks           [real_numel] bool by name; every segment
        first_mask      see `FirstMask.sample`
        last_row_codes  see `Selector`
        states          for each of ours by its name in `states`, every segment by name
        """
        self._remembered.restart(name for name in states if name != "importance")
        for name, state in self.states.items():
            for segment in self.layout.segments:
                state.load(segment, states[name][segment.name], step=counters.observations)
        self.first_mask.restore(first_mask, self._devices)
        self._selector.last_row_codes = last_row_codes
        self.counters = counters
        self.threshold_codes = threshold_codes
        self.set_masks(masks)

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Put given masks in force: [real_numel] bool for every segment, by parameter name. Collective."""
        self._group_isolated = self.exchange.total(self.masks.load(masks))
        self.isolated = int(self._group_isolated[: len(self.layout.layer_names)].sum())

    # --- a step ---

    def observe(
        self,
        sub_group: int,
        gradient: Tensor | None,
        *,
        inverse_scale: float,
        exceptions: Mapping[str, Tensor | None],
        ema_decay: float | None = None,
    ) -> None:
        """Let one sub-group's gradient enter the importance of the step about to be applied.

        gradient    [numel] the flat partition: averaged, accumulated, unclipped, unmasked; untouched. None where
                    nothing of the sub-group was ever reduced
        exceptions  parameters whose part of ``gradient`` is not theirs in this window, by name: None for a gradient
                    of zero, or the gradient ([real_numel] or longer)
        """
        if self._stored is None:
            return
        for segment in self.layout.by_sub_group[sub_group]:
            if segment.name in exceptions:
                other = exceptions[segment.name]
                own = None if other is None else other[: segment.real_numel].to(self._devices[sub_group])
            else:
                own = None if gradient is None else gradient[segment.start : segment.stop]
            self._stored.observe(
                segment,
                own,
                ema_decay=self.config.ema_decay if ema_decay is None else ema_decay,
                inverse_scale=inverse_scale,
                step=self.counters.observations,
            )

    def count_observation(self, ema_decay: float) -> None:
        """Note that every sub-group's gradient has entered the importance, with the old importance's weight."""
        weight = ema_decay * self.counters.importance_weight + (1.0 - ema_decay)
        observations = self.counters.observations + 1
        self.counters = replace(self.counters, importance_weight=weight, observations=observations)

    def note_held_gradient_energy(self, share: float) -> None:
        """Note the share of the squared gradient that the mask holds back in the step about to be applied."""
        counters = self.counters
        self.counters = replace(
            counters, held_gradient_energy=counters.held_gradient_energy + share, held_steps=counters.held_steps + 1
        )

    def note_held_step_energy(self, share: float) -> None:
        """Note the share of a squared update that the mask held back, some time after the step."""
        counters = self.counters
        self.counters = replace(
            counters,
            held_step_energy=counters.held_step_energy + share,
            measured_steps=counters.measured_steps + 1,
        )

    def finish_step(self) -> Refresh | None:
        """Count an applied step and refresh the mask where one is due. Collective when it is."""
        step = self.counters.applied_steps + 1
        if self.observes:
            self.count_observation(self.config.ema_decay)
        self.counters = replace(
            self.counters,
            applied_steps=step,
            active_steps=self.counters.active_steps + self.is_active,
        )
        return self._select(may_stay=True) if self._policy.refreshes(step) else None

    def finish_stage(self, name: str | None) -> Refresh | None:
        """Remember the importance of the stage that ends, and select the mask that the next one begins with.

        Collective. Does nothing under ``memory: none``. See `Remembered.keep`.
        """
        if self.config.memory is Memory.NONE:
            return None
        self._remembered.keep(name, self._importance(), step=self.counters.finished_stages)
        # What is compared changes.
        self._selector.last_row_codes = None
        self.counters = replace(self.counters, finished_stages=self.counters.finished_stages + 1)
        return self.refresh() if self.counters.applied_steps >= self.config.warmup_steps else None

    # --- a refresh ---

    def refresh(self) -> Refresh:
        """Select the mask from the importance as it is now. Collective; see [Note: when].

        Raises RuntimeError where nothing is measured.
        """
        refresh = self._select(may_stay=False)
        if refresh is None:
            raise RuntimeError("a selection that must not keep the mask kept it")
        return refresh

    def _select(self, *, may_stay: bool) -> Refresh | None:
        importance, step = self._importance(), self.counters.applied_steps
        started, traffic = time.perf_counter(), self.exchange.traffic
        masks = self.masks.bits
        candidates = self._selector.candidates(
            importance, self.exchange, remembered=self._remembered, masks=masks, step=step
        )
        decision = self._selector.decide(
            candidates,
            self.exchange,
            masks=masks,
            isolated=self.isolated,
            step=step,
            may_stay=may_stay,
        )
        self.last_decision = decision
        self._log(decision)
        thresholds, ratio = decision.thresholds, decision.ratio
        if thresholds is None:
            return None
        found = self._change_masks(importance, candidates, thresholds.codes)
        before, self._group_isolated = self._group_isolated, found.isolated
        spent, num_layers = self.exchange.traffic, len(self.layout.layer_names)
        columns = self.layout.group_numel, found.isolated.tolist(), found.kept.tolist(), before.tolist()
        names = (*self.layout.layer_names, *self.layout.kind_names)
        groups = tuple(GroupCounts(*row) for row in zip(names, *columns, strict=True))
        self.isolated = sum(group.isolated for group in groups[:num_layers])
        if self.isolated:
            self.first_mask.keep(masks)
        self.threshold_codes = thresholds.codes
        counters = self.counters
        self.last_refresh = Refresh(
            step=step,
            ratio=ratio,
            budget=thresholds.budget,
            isolated=self.isolated,
            covered=self.layout.covered_numel,
            tied_mass=thresholds.tied_mass,
            layers=groups[:num_layers],
            kinds=groups[num_layers:],
            importance=layer_importance(
                thresholds.codes, thresholds.extremes, tuple(segment.name for segment in self.layout.segments)
            ),
            tasks=() if candidates.tasks is None else task_shares(candidates.tasks.names, found.overlaps),
            jaccard_first=found.both_first / found.either_first if found.either_first else None,
            held_gradient_energy=counters.held_gradient_energy / counters.held_steps if counters.held_steps else None,
            held_step_energy=(counters.held_step_energy / counters.measured_steps if counters.measured_steps else None),
            seconds=time.perf_counter() - started,
            collectives=spent.collectives - traffic.collectives,
            sent_bytes=spent.sent_bytes - traffic.sent_bytes,
        )
        self.counters = replace(
            counters,
            refreshes=counters.refreshes + 1,
            held_gradient_energy=0.0,
            held_steps=0,
            held_step_energy=0.0,
            measured_steps=0,
        )
        self._warn_if_blocked(candidates, thresholds, ratio)
        return self.last_refresh

    def _log(self, decision: Decision) -> None:
        """Say what an adaptive run decided, and why."""
        config = self.config
        if self.exchange.rank != 0 or (decision.drift is None and config.ratio != ADAPTIVE):
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
        logger.info("after step %d: %s", self.counters.applied_steps, "; ".join(reasons))

    def _change_masks(self, importance: Importance, candidates: Candidates, threshold_codes: Tensor) -> _Changed:
        """Select, announce and install the masks of all sub-groups; return the counts over all ranks."""
        num_groups = len(self.layout.group_numel)
        counts = torch.zeros((2, num_groups), dtype=torch.int64)
        tasks = candidates.tasks
        overlaps = torch.zeros((0, 0), dtype=torch.int64) if tasks is None else tasks.overlaps(threshold_codes)
        for sub_group, segments in enumerate(self.layout.by_sub_group):
            before = self.masks.bits[sub_group]
            selected = select_bits(
                candidates.compared,
                before,
                segments=segments,
                numel=self.layout.sub_group_numel[sub_group],
                threshold_codes=threshold_codes,
                groups_of=self.layout.groups_of,
                num_groups=num_groups,
            )
            if self._listener is not None:
                self._listener.mask_changes(
                    sub_group,
                    before=before,
                    now=selected.bits,
                    importance=partition_reader(importance, segments, self._devices[sub_group]),
                )
            self.masks.replace(sub_group, selected.bits)
            counts += selected.counts
        parts = counts.flatten(), self.first_mask.compare(self.masks.bits), overlaps.flatten()
        largest = self.layout.covered_numel if len(overlaps) else max(self.layout.group_numel)
        merged = self.exchange.total(torch.cat(parts).to(count_dtype(largest))).long()
        groups, first, pairs = torch.split(merged, [part.numel() for part in parts])
        return _Changed(groups[:num_groups], groups[num_groups:], int(first[0]), int(first[1]), pairs.view_as(overlaps))

    def _warn_if_blocked(self, candidates: Candidates, thresholds: Thresholds, ratio: float) -> None:
        """Warn when ties keep most of the budget unused, and name the layer to look at. Collective where it warns."""
        if thresholds.budget == 0 or self.isolated >= thresholds.budget / 2:
            return
        if self.config.protects is Protects.PAST and not self.counters.finished_stages:
            # There is no past yet: as configured.
            return
        largest = thresholds.extremes.max_codes.clamp(min=1).unsqueeze(1)
        at_maximum = self.exchange.total(self._selector.sketch(candidates.importance).counts(largest)[:, 0])
        layer = int(at_maximum.argmax())
        if self.exchange.rank == 0:
            logger.warning(
                "refresh after step %d isolated %d entries of the %d that ratio %s allows; layer %r has %d entries at "
                "its maximum, and equal entries are isolated together or not at all",
                self.counters.applied_steps,
                self.isolated,
                thresholds.budget,
                ratio,
                self.layout.layer_names[layer],
                int(at_maximum[layer]),
            )
