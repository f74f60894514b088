"""An anchor that lies in a folder of weights: this rank's slices of it, as the model would have been made of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from epi_ds.checkpoint.digest import FileRecord
from epi_ds.checkpoint.weights_folder import WeightsFolder
from epi_ds.isolation.anchor.values import AnchoredSpan
from epi_ds.isolation.layout import Segment
from epi_ds.isolation.placement import Placement


class FolderAnchor:
    """Reads covered entries from a folder's files."""

    def __init__(self, folder: WeightsFolder, placement: Placement, *, dtype: torch.dtype) -> None:
        """``dtype`` is the model's: what a file holds in more bits was rounded to it when the model was made.

        Raises UserError where the folder lacks a covered parameter, or has it in another shape.
        """
        self._folder, self._placement, self._dtype = folder, placement, dtype
        folder.check({segment.name: segment.shape for segment in placement.layout.segments})

    def of(self, segment: Segment) -> Tensor:
        """Return one parameter's slice. [real_numel] of the model's dtype, CPU; not to be written to."""
        first = segment.global_start
        return self._folder.read(segment.name, first, first + segment.real_numel).to(self._dtype)

    def packed(self, sub_group: int) -> Tensor:
        """Return the covered entries of a flat partition, packed. fp32, CPU."""
        segments = self._placement.layout.by_sub_group[sub_group]
        # Without any segment there is nothing to join.
        return torch.cat([torch.zeros(0), *(self.of(segment).float() for segment in segments)])

    def spans(self, sub_group: int) -> Iterator[AnchoredSpan]:
        """Yield what a flat partition is pulled towards, one parameter after the other."""
        home = self._placement.devices[sub_group]
        for segment in self._placement.layout.by_sub_group[sub_group]:
            if segment.real_numel:
                values = self.of(segment)
                # The kernels read two widths; a half of fp16 is exact in the wider one.
                values = values if values.dtype is torch.bfloat16 else values.float()
                yield AnchoredSpan(segment.start, segment.stop, values.to(home))

    def differing(self, sub_group: int, weights: Tensor) -> list[str]:
        """Return the parameters of which this rank's slice is not, bit for bit, what the weights are.

        weights  [numel] fp32, the flat partition
        """
        found = []
        for segment in self._placement.layout.by_sub_group[sub_group]:
            own = weights[segment.start : segment.stop].cpu()
            if not torch.equal(own.view(torch.int32), self.of(segment).float().view(torch.int32)):
                found.append(segment.name)
        return found

    @cached_property
    def records(self) -> dict[str, FileRecord]:
        """Records of the folder's files; read whole when first asked for."""
        return self._folder.records()
