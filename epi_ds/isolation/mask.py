"""The isolation mask of a flat partition: selecting it from importance, and comparing it with the one before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from epi_ds.isolation.importance.codes import codes_of
from epi_ds.isolation.importance.views import Importance
from epi_ds.isolation.layout import Segment
from epi_ds.isolation.placement import Placement
from epi_ds.kernels import chunks, count_bits, select_, set_bits, slice_bits, unpack_bits


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

    def replace(self, sub_group: int, selected: Selected) -> None:
        """Put the mask of one partition in force."""
        self.bits[sub_group] = selected.bits
        self.isolated_here[sub_group] = selected.isolated

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


class Selected(NamedTuple):
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


def select_bits(
    importance: Importance,
    before: Tensor,
    *,
    segments: Sequence[Segment],
    threshold_codes: Tensor,
    groups_of: Mapping[str, tuple[int, ...]],
    num_groups: int,
) -> Selected:
    """Select the entries of one partition whose code reaches its layer's threshold.

    before           [ceil(numel / 8)]  uint8, the mask in force, untouched
    segments         the covered segments of this partition; entries outside them stay plastic
    threshold_codes  [num_layers]       int64 on the CPU
    groups_of        the groups in which a parameter's entries are counted, by its name
    """
    limits = [int(code) for code in threshold_codes]
    bits = torch.zeros_like(before)
    found: dict[str, Tensor] = {}
    for segment in segments:
        for start, stop in chunks(0, segment.real_numel):
            counts = select_(
                bits,
                codes_of(importance.read(segment, start, stop)),
                before,
                threshold_code=limits[segment.layer],
                first_entry=segment.start + start,
            )
            found[segment.name] = found[segment.name] + counts if start else counts
    by_group, isolated = torch.zeros((2, num_groups), dtype=torch.int64), 0
    if found:
        # Fetched at once: every look at a device waits for all that it has to do.
        for name, counts in zip(found, torch.stack(list(found.values())).cpu(), strict=True):
            isolated += int(counts[0])
            for group in groups_of[name]:
                by_group[:, group] += counts
    return Selected(bits, by_group, isolated)
