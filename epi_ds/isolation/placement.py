"""Where this rank's entries lie: the geometry of its flat partitions, and the device that is home to each of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from epi_ds.isolation.layout import Layout, Segment


@dataclass(frozen=True)
class Placement:
    """What everything that is kept per entry is laid out by; the devices differ where ZeRO-3 offloads a part."""

    layout: Layout
    devices: tuple[torch.device, ...]
    """The home of each sub-group's fp32 partition, in the order of `Layout.sub_group_numel`."""

    def __post_init__(self) -> None:
        if len(self.devices) != len(self.layout.sub_group_numel):
            raise ValueError(
                f"{len(self.layout.sub_group_numel)} sub-groups need a home each, got {len(self.devices)} devices"
            )

    def home_of(self, segment: Segment) -> torch.device:
        """Return the device that a segment's entries are at home on."""
        return self.devices[segment.sub_group]
