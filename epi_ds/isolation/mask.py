"""The isolation masks of this rank's flat partitions: which are in force, and how new ones are selected."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from epi_ds.isolation.importance.codes import codes_of
from epi_ds.isolation.importance.views import Importance, ReadPartition, partition_reader
from epi_ds.isolation.layout import Layout, Segment
from epi_ds.isolation.placement import Placement
from epi_ds.kernels import chunks, count_bits, select_, set_bits, slice_bits, unpack_bits


class MaskListener(Protocol):
    """Told about every partition whose mask a refresh changes, before the new mask is in force. Masks that are loaded
    come with the moments that belong to them.
    """

    def __call__(self, sub_group: int, *, before: Tensor, now: Tensor, importance: ReadPartition) -> None:
        """``before`` and ``now`` are uint8 bits of the sub-group's flat partition, which ``importance`` reads."""


class Masks:
    """The masks in force on one rank's partitions."""

    def __init__(self, placement: Placement) -> None:
        """No entry is isolated."""
        self.placement = placement
        homes = zip(placement.layout.sub_group_numel, placement.devices, strict=True)
        self.bits = [empty_bits(numel, device) for numel, device in homes]
        """uint8 bits of every sub-group's flat partition."""
        self.isolated_here = [0] * len(self.bits)
        """Isolated entries of every sub-group's partition."""

    @property
    def num_bytes(self) -> int:
        """Bytes on this rank."""
        return sum(bits.numel() for bits in self.bits)

    def segment(self, segment: Segment) -> Tensor:
        """Return a slice of a parameter's mask. [real_numel] bool, on the CPU."""
        # Moved as bits: on the device, a nearly full one, the slice would take eight times the room.
        return unpack_bits(self.segment_bits(segment).cpu(), 0, segment.real_numel)

    def segment_bits(self, segment: Segment) -> Tensor:
        """Return a slice of a parameter's mask as bits of its own. [ceil(real_numel / 8)] uint8, on the device."""
        return slice_bits(self.bits[segment.sub_group], segment.start, segment.stop)

    def select(
        self,
        compared: Importance,
        threshold_codes: Tensor,
        *,
        measured: Importance,
        listener: MaskListener | None,
    ) -> Tensor:
        """Put the masks in force that isolate what reaches its layer's threshold; return counts of this rank's entries.

        compared         what is compared with the thresholds
        threshold_codes  [num_layers]     int64 on the CPU
        measured         what the listener may read
        ->               [2, num_groups]  int64 on the CPU: isolated now, isolated before and now
        """
        layout = self.placement.layout
        counts = torch.zeros((2, len(layout.group_numel)), dtype=torch.int64)
        for sub_group, before in enumerate(self.bits):
            selected = _select(compared, before, layout=layout, sub_group=sub_group, threshold_codes=threshold_codes)
            if listener is not None:
                reader = partition_reader(measured, self.placement, sub_group)
                listener(sub_group, before=before, now=selected.bits, importance=reader)
            self.bits[sub_group] = selected.bits
            self.isolated_here[sub_group] = selected.isolated
            counts += selected.counts
        return counts

    def load(self, mask_of: Callable[[Segment], Tensor]) -> Tensor:
        """Put given masks in force; return this rank's isolated entries by layer and by kind ([num_groups] int64).

        mask_of  -> [real_numel] bool; asked for one segment after the other
        """
        layout = self.placement.layout
        counts = torch.zeros(len(layout.group_numel), dtype=torch.int64)
        for segment in layout.segments:
            mask = mask_of(segment)
            set_bits(self.bits[segment.sub_group], mask, segment.start)
            # Not `sum`, which makes eight bytes of every entry first.
            isolated = int(torch.count_nonzero(mask))
            for group in layout.groups_of[segment.name]:
                counts[group] += isolated
        self.isolated_here = [count_bits(bits) for bits in self.bits]
        return counts


class _Selected(NamedTuple):
    """A new mask of one partition and how it compares with the old one, by group. Counts are this rank's."""

    bits: Tensor
    """[ceil(numel / 8)] uint8, on the partition's device."""
    counts: Tensor
    """[2, num_groups] int64 on the CPU: isolated now, isolated before and now."""
    isolated: int
    """Entries isolated now, each counted once."""


def empty_bits(numel: int, device: torch.device) -> Tensor:
    """Return a mask of ``numel`` entries of which none is isolated."""
    return torch.zeros(-(-numel // 8), dtype=torch.uint8, device=device)


def _select(
    compared: Importance, before: Tensor, *, layout: Layout, sub_group: int, threshold_codes: Tensor
) -> _Selected:
    """Select the entries of one partition whose code reaches its layer's threshold; others stay plastic.

    before           [ceil(numel / 8)]  uint8, the mask in force, untouched
    threshold_codes  [num_layers]       int64 on the CPU
    """
    limits = [int(code) for code in threshold_codes]
    bits = torch.zeros_like(before)
    found: dict[str, Tensor] = {}
    for segment in layout.by_sub_group[sub_group]:
        for start, stop in chunks(0, segment.real_numel):
            counts = select_(
                bits,
                codes_of(compared.read(segment, start, stop)),
                before,
                threshold_code=limits[segment.layer],
                first_entry=segment.start + start,
            )
            found[segment.name] = found[segment.name] + counts if start else counts
    by_group, isolated = torch.zeros((2, len(layout.group_numel)), dtype=torch.int64), 0
    if found:
        # Fetched at once: every look at a device waits for all that it has to do.
        for name, counts in zip(found, torch.stack(list(found.values())).cpu(), strict=True):
            isolated += int(counts[0])
            for group in layout.groups_of[name]:
                by_group[:, group] += counts
    return _Selected(bits, by_group, isolated)
