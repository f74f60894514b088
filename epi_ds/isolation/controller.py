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
from epi_ds.isolation.mask import empty_bits, select_bits, set_segment
from epi_ds.isolation.policy import Policy
from epi_ds.isolation.refresh import FirstMask, GroupCounts, Refresh, layer_importance
from epi_ds.isolation.schedule import largest_ratio
from epi_ds.isolation.selector import Decision, Selector
from epi_ds.isolation.sketch import PartitionSketch
from epi_ds.isolation.state import (
    Importance,
    ReadPartition,
    StoredImportance,
    partition_reader,
)
from epi_ds.isolation.threshold import Thresholds
from epi_ds.kernels import Stored, count_bits, unpack_bits

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
        self._selector = Selector(layout, config)
        self.isolated = 0
        self._policy = policy
        self._listener = listener
        self._devices = list(devices)
        self._moments = moments
        self._stored: StoredImportance | None = None
        self._remembered = None if config.memory is Memory.NONE else self._new_state("remembered")
        self._bits = [empty_bits(numel, device) for numel, device in zip(layout.sub_group_numel, devices, strict=True)]
        self._local_isolated = [0] * len(self._bits)
        self._group_isolated = torch.zeros(len(layout.group_numel), dtype=torch.int64)
        if policy.observes(1):
            self.start_measuring()

    # --- state ---

    def start_measuring(self) -> None:
        """Allocate zero importance, if there is none yet and it is ours to keep."""
        config = self.config
        if self._stored is None and config.state is not StateFormat.ADAM:
            self._stored = self._new_state("importance")

    def _new_state(self, purpose: str) -> StoredImportance:
        config = self.config
        return StoredImportance(self.layout, config.state, devices=self._devices, seed=config.seed, purpose=purpose)

    def stop_measuring(self) -> None:
        """Free the importance."""
        self._stored = None

    @property
    def states(self) -> dict[str, StoredImportance]:
        """Everything per entry that is ours beside the masks: ``importance`` where it is measured and not the
        optimizer's, and what is ``remembered`` of finished stages.
        """
        states = {"importance": self._stored, "remembered": self._remembered}
        return {name: state for name, state in states.items() if state is not None}

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
        return self._local_isolated[sub_group] > 0

    def bits(self, sub_group: int) -> Tensor:
        """Return the mask in force: uint8 bits of the sub-group's flat partition. Not a copy."""
        return self._bits[sub_group]

    def segment_mask(self, segment: Segment) -> Tensor:
        """Return this rank's slice of a parameter's mask. [real_numel] bool, on the CPU."""
        first_byte = segment.start // 8
        # Moved as bits: on the device, a nearly full one, the slice would take eight times the room.
        packed = self._bits[segment.sub_group][first_byte : -(-segment.stop // 8)].cpu()
        return unpack_bits(packed, segment.start - first_byte * 8, segment.stop - first_byte * 8)

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
    def last_tau_code(self) -> int | None:
        """See `Selector.last_tau_code`."""
        return self._selector.last_tau_code

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes on this rank of each of `states`, of the masks and of the sample of the first one."""
        sizes = {name: state.num_bytes for name, state in self.states.items()}
        sample = sum(bits.numel() for bits in self.first_mask.sample)
        return {**sizes, "masks": sum(bits.numel() for bits in self._bits), "first_mask": sample}

    def restore(
        self,
        *,
        counters: Counters,
        threshold_codes: Tensor | None,
        masks: Mapping[str, Tensor],
        states: Mapping[str, Mapping[str, Stored]],
        first_mask: Sequence[Tensor] = (),
        last_tau_code: int | None = None,
    ) -> None:
        """Replace the whole state by slices of this rank's segments, by parameter name. Collective.

        masks       [real_numel] bool by name; every segment
        first_mask  see `FirstMask.sample`
        last_tau_code  see `Selector`
        states      for each of ours by its name in `states`, every segment by name
        """
        for name, state in self.states.items():
            for segment in self.layout.segments:
                state.load(segment, states[name][segment.name], step=counters.observations)
        self.first_mask.restore(first_mask, self._devices)
        self._selector.last_tau_code = last_tau_code
        self.counters = counters
        self.threshold_codes = threshold_codes
        self.set_masks(masks)

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Put given masks in force: [real_numel] bool for every segment, by parameter name. Collective."""
        for segment in self.layout.segments:
            set_segment(self._bits[segment.sub_group], segment, masks[segment.name])
        self._local_isolated = [count_bits(bits) for bits in self._bits]
        local = torch.zeros_like(self._group_isolated)
        for name, groups in self.layout.groups_of.items():
            for group in groups:
                local[group] += int(masks[name].sum())
        self._group_isolated = self.exchange.total(local)
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

    def note_held_energy(self, share: float) -> None:
        """Note the share of the squared gradient that the mask holds back in the step about to be applied."""
        counters = self.counters
        self.counters = replace(counters, held_energy=counters.held_energy + share, held_steps=counters.held_steps + 1)

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

    def finish_stage(self) -> Refresh | None:
        """Remember the importance of the stage that ends, and select the mask that the next one begins with.

        Collective. Does nothing under ``memory: none``.
        """
        if self._remembered is None:
            return None
        importance = self._importance()
        for segment in self.layout.segments:
            self._remembered.raise_to(segment, importance, step=self.counters.finished_stages)
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
        unfavoured = self._selector.unfavoured(importance, remembered=self._remembered)
        compared = self._selector.compared(unfavoured, masks=self._bits)
        decision = self._selector.decide(
            compared,
            self.exchange,
            unfavoured=unfavoured,
            masks=self._bits,
            isolated=self.isolated,
            step=step,
            may_stay=may_stay,
        )
        self.last_decision = decision
        self._log(decision)
        thresholds, ratio = decision.thresholds, decision.ratio
        if thresholds is None:
            return None
        sketch = self._selector.sketch(unfavoured)
        found = self._change_masks(importance, compared, thresholds.codes)
        before, self._group_isolated = self._group_isolated, found.isolated
        spent, num_layers = self.exchange.traffic, len(self.layout.layer_names)
        columns = self.layout.group_numel, found.isolated.tolist(), found.kept.tolist(), before.tolist()
        names = (*self.layout.layer_names, *self.layout.kind_names)
        groups = tuple(GroupCounts(*row) for row in zip(names, *columns, strict=True))
        self.isolated = sum(group.isolated for group in groups[:num_layers])
        if self.isolated:
            self.first_mask.keep(self._bits)
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
            jaccard_first=found.both_first / found.either_first if found.either_first else None,
            held_gradient_energy=counters.held_energy / counters.held_steps if counters.held_steps else None,
            seconds=time.perf_counter() - started,
            collectives=spent.collectives - traffic.collectives,
            sent_bytes=spent.sent_bytes - traffic.sent_bytes,
        )
        self.counters = replace(counters, refreshes=counters.refreshes + 1, held_energy=0.0, held_steps=0)
        self._warn_if_blocked(sketch, thresholds, ratio)
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

    def _change_masks(self, importance: Importance, compared: Importance, threshold_codes: Tensor) -> _Changed:
        """Select, announce and install the masks of all sub-groups; return the counts over all ranks."""
        num_groups = len(self.layout.group_numel)
        counts = torch.zeros((2, num_groups), dtype=torch.int64)
        for sub_group, segments in enumerate(self.layout.by_sub_group):
            selected = select_bits(
                compared,
                self._bits[sub_group],
                segments=segments,
                numel=self.layout.sub_group_numel[sub_group],
                threshold_codes=threshold_codes,
                groups_of=self.layout.groups_of,
                num_groups=num_groups,
            )
            if self._listener is not None:
                self._listener.mask_changes(
                    sub_group,
                    before=self._bits[sub_group],
                    now=selected.bits,
                    importance=partition_reader(importance, segments, self._devices[sub_group]),
                )
            self._bits[sub_group] = selected.bits
            self._local_isolated[sub_group] = count_bits(selected.bits)
            counts += selected.counts
        sent = torch.cat([counts.flatten(), self.first_mask.compare(self._bits)])
        merged = self.exchange.total(sent.to(count_dtype(max(self.layout.group_numel)))).long()
        return _Changed(merged[:num_groups], merged[num_groups:-2], int(merged[-2]), int(merged[-1]))

    def _warn_if_blocked(self, sketch: PartitionSketch, thresholds: Thresholds, ratio: float) -> None:
        """Warn when ties keep most of the budget unused, and name the layer to look at. Collective where it warns."""
        if thresholds.budget == 0 or self.isolated >= thresholds.budget / 2:
            return
        if self.config.protects is Protects.PAST and not self.counters.finished_stages:
            # There is no past yet: as configured.
            return
        largest = thresholds.extremes.max_codes.clamp(min=1).unsqueeze(1)
        at_maximum = self.exchange.total(sketch.counts(largest)[:, 0])
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
