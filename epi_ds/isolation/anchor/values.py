"""The weights that an anchor pulls towards: this rank's slices of them, in as few bytes as they take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from epi_ds.choices import AnchorDevice
from epi_ds.isolation.layout import Segment, Span, merge_spans
from epi_ds.isolation.placement import Placement
from epi_ds.kernels import chunks


class AnchoredSpan(NamedTuple):
    """Neighbouring entries of a flat partition, and what they are pulled towards."""

    start: int
    """Where they begin in the partition."""
    stop: int
    anchor: Tensor
    """[stop - start] fp32 or bf16, on the partition's device; not to be written to."""


class AnchorValues:
    """Covered entries of every flat partition, packed; none before they are `take`n. Padding has no place here."""

    def __init__(self, placement: Placement, device: AnchorDevice) -> None:
        self._placement = placement
        self._on_host = device is AnchorDevice.CPU
        by_sub_group = placement.layout.by_sub_group
        self._spans = [merge_spans(Span(one.start, one.stop) for one in segments) for segments in by_sub_group]
        self._offsets: dict[str, int] = {}
        """Where each parameter's entries begin among the packed ones."""
        for segments in by_sub_group:
            offset = 0
            for segment in segments:
                self._offsets[segment.name] = offset
                offset += segment.real_numel
        self._values: list[Tensor | None] = [None] * len(by_sub_group)

    def has(self, sub_group: int) -> bool:
        """Whether the sub-group's entries were taken."""
        return self._values[sub_group] is not None

    def forget(self) -> None:
        """Drop all of them: the next ones are taken anew."""
        self._values = [None] * len(self._values)

    def packed(self, sub_group: int, weights: Tensor) -> Tensor:
        """Return the covered entries of a flat partition, packed; a copy. fp32, on its device."""
        spans = self._spans[sub_group]
        return torch.cat([weights[start:stop] for start, stop in spans]) if spans else weights.new_zeros(0)

    def take(self, sub_group: int, packed: Tensor, *, narrow: bool) -> None:
        """Keep packed entries: 2 bytes each where ``narrow``, which must be exact (`is_bf16`), else 4."""
        kept = packed.bfloat16() if narrow else packed
        home = self._placement.devices[sub_group]
        if not self._on_host or home.type == "cpu":
            kept = kept.to(home)
        else:
            # Pinned, so that the copies of a step do not wait for each other.
            kept = kept.cpu().pin_memory()
        self._values[sub_group] = kept

    def spans(self, sub_group: int) -> Iterator[AnchoredSpan]:
        """Yield what a flat partition is pulled towards, by spans in ascending order."""
        values, first = self._values[sub_group], 0
        if values is None:
            return
        values = values.to(self._placement.devices[sub_group], non_blocking=True)
        for start, stop in self._spans[sub_group]:
            yield AnchoredSpan(start, stop, values[first : first + stop - start])
            first += stop - start

    def of(self, segment: Segment) -> Tensor:
        """Return what one parameter's slice is pulled towards, where it is kept. [real_numel] fp32 or bf16."""
        values = self._values[segment.sub_group]
        if values is None:
            raise RuntimeError(f"the anchor of {segment.name} was asked for before it was taken")
        first = self._offsets[segment.name]
        return values[first : first + segment.real_numel]

    @property
    def num_bytes(self) -> int:
        """Bytes on this rank."""
        return sum(one.numel() * one.element_size() for one in self._values if one is not None)


def is_bf16(values: Tensor) -> bool:
    """Whether all fp32 values are exactly bf16, bit for bit."""
    for start, stop in chunks(0, values.numel()):
        part = values[start:stop]
        if not torch.equal(part.bfloat16().float().view(torch.int32), part.view(torch.int32)):
            return False
    return True
