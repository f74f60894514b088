"""When importance is observed, when masks are refreshed, and what a refresh found. Knows no DeepSpeed.

[Note: when] The mask of a window is fixed before the window's first backward: a refresh after applied step t selects
the mask in force from step t + 1 on, so norm, clipping and offload copies of one step all see the same mask.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from epi_ds.config import EPIConfig, PolicyName
from epi_ds.isolation.bracket import count_dtype
from epi_ds.isolation.collectives import GroupExchange
from epi_ds.isolation.importance import codes_of
from epi_ds.isolation.layout import Layout, Segment, Span, merge_spans
from epi_ds.isolation.mask import empty_bits, select_bits, set_segment
from epi_ds.isolation.policy import Policy
from epi_ds.isolation.sketch import PartitionSketch
from epi_ds.isolation.threshold import Thresholds, find_thresholds
from epi_ds.kernels import count_bits, observe_, unpack_bits

logger = logging.getLogger(__name__)


class Refresh(NamedTuple):
    """What a refresh selected, over all ranks. Counts are of entries."""

    step: int
    """Applied steps before the refresh."""
    budget: int
    isolated: int
    layer_isolated: tuple[int, ...]
    layer_kept: tuple[int, ...]
    """Isolated both before and now, by layer."""
    layer_before: tuple[int, ...]
    """Isolated before, by layer."""
    tied_mass: int
    """Entries that the next smaller threshold would isolate on top; see `Thresholds.tied_mass`."""
    seconds: float
    collectives: int
    sent_bytes: int

    @property
    def jaccard(self) -> float | None:
        """Overlap of the masks before and now (intersection over union); None where there was no mask before."""
        before, kept = sum(self.layer_before), sum(self.layer_kept)
        return kept / (before + self.isolated - kept) if before else None


@dataclass(frozen=True)
class Counters:
    """What has happened so far. The same on every rank; saved with a checkpoint."""

    applied_steps: int = 0
    importance_weight: float = 0.0
    """Total weight of the squared gradients in the importance: 1 - ema_decay^t after t steps, 1 after a probe."""
    active_steps: int = 0
    """Applied steps that ran under a mask with at least one isolated entry."""
    refreshes: int = 0

    def to_dict(self) -> dict[str, int | float]:
        """Return what `from_dict` takes; JSON keeps every bit of it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Counters:
        """Return saved counters."""
        return cls(**saved)


class MaskListener(Protocol):
    """Told about every partition whose mask changes, before the new mask is in force."""

    def mask_changes(self, sub_group: int, *, before: Tensor, now: Tensor, importance: Tensor | None) -> None:
        """``before`` and ``now`` are uint8 bits and ``importance`` fp32, of the sub-group's flat partition."""


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
    ) -> None:
        """``devices`` are the home devices of the sub-groups' fp32 partitions."""
        self.layout = layout
        self.config = config
        self.exchange = exchange
        self.counters = Counters()
        self.last_refresh: Refresh | None = None
        self.threshold_codes: Tensor | None = None
        self.isolated = 0
        self._policy = policy
        self._listener = listener
        self._devices = list(devices)
        self._importance: list[Tensor] | None = None
        self._bits = [empty_bits(numel, device) for numel, device in zip(layout.sub_group_numel, devices, strict=True)]
        self._local_isolated = [0] * len(self._bits)
        self._spans = tuple(
            merge_spans(Span(segment.start, segment.stop) for segment in group) for group in layout.by_sub_group
        )
        if policy.observes(1):
            self.start_measuring()

    # --- state ---

    def start_measuring(self) -> None:
        """Allocate zero importance, if there is none yet."""
        if self._importance is None:
            self._importance = [
                torch.zeros(numel, dtype=torch.float32, device=device)
                for numel, device in zip(self.layout.sub_group_numel, self._devices, strict=True)
            ]

    def stop_measuring(self) -> None:
        """Free the importance."""
        self._importance = None

    @property
    def measures(self) -> bool:
        """Whether there is importance."""
        return self._importance is not None

    @property
    def observes(self) -> bool:
        """Whether the gradient of the step about to be applied enters the importance."""
        return self._policy.observes(self.counters.applied_steps + 1)

    @property
    def awaits_probe(self) -> bool:
        """Whether the mask of a static policy is still to come from a probe; the same on every rank."""
        config = self.config
        wants_one = config.policy is PolicyName.STATIC and config.probe_steps is not None and config.ratio > 0
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

    def segment_importance(self, segment: Segment) -> Tensor:
        """Return this rank's slice of a parameter's importance. [real_numel] fp32, not a copy."""
        if self._importance is None:
            raise RuntimeError(
                f"there is no importance for {segment.name}: policy {self.config.policy.value} does not measure it"
            )
        return self._importance[segment.sub_group][segment.start : segment.stop]

    def state_bytes(self) -> tuple[int, int]:
        """Return the bytes of importance and of masks that live on this rank."""
        importance = self._importance or []
        return sum(t.numel() * t.element_size() for t in importance), sum(t.numel() for t in self._bits)

    def restore(
        self,
        *,
        counters: Counters,
        threshold_codes: Tensor | None,
        masks: Mapping[str, Tensor],
        importance: Mapping[str, Tensor],
    ) -> None:
        """Replace the whole state by slices of this rank's segments, by parameter name. Collective.

        masks       [real_numel] bool by name; every segment
        importance  [real_numel] fp32 by name; every segment, or empty where nothing is measured
        """
        if self.measures:
            for segment in self.layout.segments:
                self.segment_importance(segment).copy_(importance[segment.name])
        self.counters = counters
        self.threshold_codes = threshold_codes
        self.set_masks(masks)

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Put given masks in force: [real_numel] bool for every segment, by parameter name. Collective."""
        for segment in self.layout.segments:
            set_segment(self._bits[segment.sub_group], segment, masks[segment.name])
        self._local_isolated = [count_bits(bits) for bits in self._bits]
        self.isolated = int(self.exchange.total(torch.tensor([sum(self._local_isolated)]))[0])

    # --- a step ---

    def observe(
        self,
        sub_group: int,
        gradient: Tensor,
        *,
        inverse_scale: float,
        exceptions: Mapping[str, Tensor | None],
        ema_decay: float | None = None,
    ) -> None:
        """Let one sub-group's gradient enter the importance of the step about to be applied.

        gradient    [numel] the flat partition: averaged, accumulated, unclipped, unmasked; untouched
        exceptions  parameters whose part of ``gradient`` is not theirs in this window, by name: None for a gradient
                    of zero, or the gradient ([real_numel] or longer)
        """
        if self._importance is None:
            return
        decay = self.config.ema_decay if ema_decay is None else ema_decay
        importance = self._importance[sub_group]
        group = self.layout.by_sub_group[sub_group]
        spans = self._spans[sub_group]
        if exceptions:
            spans = merge_spans(Span(s.start, s.stop) for s in group if s.name not in exceptions)
        for start, stop in spans:
            observe_(importance[start:stop], gradient[start:stop], ema_decay=decay, inverse_scale=inverse_scale)
        for segment in group:
            if segment.name in exceptions:
                own = exceptions[segment.name]
                target = importance[segment.start : segment.stop]
                source = None if own is None else own[: segment.real_numel].to(target.device)
                observe_(target, source, ema_decay=decay, inverse_scale=inverse_scale)

    def count_observation(self, ema_decay: float) -> None:
        """Note that every sub-group's gradient has entered the importance, with the old importance's weight."""
        weight = ema_decay * self.counters.importance_weight + (1.0 - ema_decay)
        self.counters = replace(self.counters, importance_weight=weight)

    def finish_step(self) -> Refresh | None:
        """Count an applied step and refresh the mask where one is due. Collective when it is."""
        step = self.counters.applied_steps + 1
        if self._policy.observes(step):
            self.count_observation(self.config.ema_decay)
        self.counters = replace(
            self.counters,
            applied_steps=step,
            active_steps=self.counters.active_steps + self.is_active,
        )
        return self.refresh() if self._policy.refreshes(step) else None

    # --- a refresh ---

    def refresh(self) -> Refresh:
        """Select the mask from the importance as it is now. Collective; see [Note: when].

        Raises RuntimeError where nothing has been measured.
        """
        if self._importance is None:
            raise RuntimeError(
                f"there is no importance to select a mask from: policy {self.config.policy.value} does not measure it"
            )
        started, traffic = time.perf_counter(), self.exchange.traffic
        sketch = PartitionSketch(
            [(segment.layer, codes_of(self.segment_importance(segment))) for segment in self.layout.segments],
            num_layers=len(self.layout.layer_names),
        )
        thresholds = find_thresholds(
            sketch,
            self.exchange,
            ratio=self.config.ratio,
            layer_numel=self.layout.layer_numel,
            selection=self.config.selection,
            normalizer=self.config.normalizer,
        )
        counts = self._change_masks(thresholds.codes)
        spent = self.exchange.traffic
        self.isolated = int(counts[0].sum())
        self.threshold_codes = thresholds.codes
        self.counters = replace(self.counters, refreshes=self.counters.refreshes + 1)
        self.last_refresh = Refresh(
            step=self.counters.applied_steps,
            budget=thresholds.budget,
            isolated=self.isolated,
            layer_isolated=tuple(counts[0].tolist()),
            layer_kept=tuple(counts[1].tolist()),
            layer_before=tuple(counts[2].tolist()),
            tied_mass=thresholds.tied_mass,
            seconds=time.perf_counter() - started,
            collectives=spent.collectives - traffic.collectives,
            sent_bytes=spent.sent_bytes - traffic.sent_bytes,
        )
        self._warn_if_blocked(sketch, thresholds)
        return self.last_refresh

    def _change_masks(self, threshold_codes: Tensor) -> Tensor:
        """Select, announce and install the masks of all sub-groups; return the counts over all ranks."""
        if self._importance is None:
            raise RuntimeError("no importance")
        num_layers = len(self.layout.layer_names)
        counts = torch.zeros((3, num_layers), dtype=torch.int64)
        for sub_group, importance in enumerate(self._importance):
            selected = select_bits(
                importance,
                self._bits[sub_group],
                self.layout.by_sub_group[sub_group],
                threshold_codes=threshold_codes,
                num_layers=num_layers,
            )
            if self._listener is not None:
                self._listener.mask_changes(
                    sub_group, before=self._bits[sub_group], now=selected.bits, importance=importance
                )
            self._bits[sub_group] = selected.bits
            self._local_isolated[sub_group] = int(selected.counts[0].sum())
            counts += selected.counts
        return self.exchange.total(counts.to(count_dtype(max(self.layout.layer_numel)))).long()

    def _warn_if_blocked(self, sketch: PartitionSketch, thresholds: Thresholds) -> None:
        """Warn when ties keep most of the budget unused, and name the layer to look at. Collective where it warns."""
        if thresholds.budget == 0 or self.isolated >= thresholds.budget / 2:
            return
        cause = ""
        if thresholds.max_codes is not None:
            at_maximum = self.exchange.total(sketch.counts(thresholds.max_codes.clamp(min=1).unsqueeze(1))[:, 0])
            layer = int(at_maximum.argmax())
            cause = (
                f"; layer {self.layout.layer_names[layer]!r} has {int(at_maximum[layer])} entries at its maximum, and "
                "equal entries are isolated together or not at all"
            )
        if self.exchange.rank == 0:
            logger.warning(
                "refresh after step %d isolated %d entries of the %d that ratio %s allows%s",
                self.counters.applied_steps,
                self.isolated,
                thresholds.budget,
                self.config.ratio,
                cause,
            )
