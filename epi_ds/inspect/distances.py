"""How far weights are from where they began, and where that stands: an anchor, or the folder of a model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from epi_ds.anchor_config import RUN
from epi_ds.checkpoint.manifest import ANCHOR_STATE, SavedAnchor
from epi_ds.checkpoint.shards import TagShards
from epi_ds.checkpoint.weights_folder import WeightsFolder
from epi_ds.errors import UserError
from epi_ds.isolation.layout import Segment
from epi_ds.kernels import decode


class Distance(NamedTuple):
    """How far a group of weights has moved. Entries that are not known of where they began are not among them."""

    entries: int
    moved: int
    """Entries of which a bit differs."""
    rms: float
    """Root of the mean square of the difference."""
    relative: float
    """The norm of the difference over that of the weights at the beginning; inf where these were zero."""
    largest: float
    largest_in: str
    """Name of the parameter with the largest difference."""
    isolated_rms: float | None
    """``rms`` over the entries that are isolated now; None where none is. They may have moved before they were."""


class DistanceTally:
    """Sums over the entries of a group."""

    def __init__(self) -> None:
        self._entries = self._moved = self._isolated = 0
        self._squares = self._isolated_squares = self._norm = 0.0
        self._largest, self._largest_in = 0.0, ""

    def measure(self, before: Tensor, now: Tensor, mask: Tensor, *, name: str) -> None:
        """Take in neighbouring entries of a parameter. ``before`` and ``now`` are fp32, ``mask`` is bool."""
        # Bit patterns: -0.0 equals 0.0 as a number.
        self._moved += int(torch.count_nonzero(before.view(torch.int32) != now.view(torch.int32)))
        difference = now.double().sub_(before)
        largest = float(difference.abs().max())
        if largest > self._largest:
            self._largest, self._largest_in = largest, name
        squares = difference.square_()
        self._entries += now.numel()
        self._isolated += int(torch.count_nonzero(mask))
        self._squares += float(squares.sum())
        self._isolated_squares += float(squares[mask].sum())
        self._norm += float(before.double().square_().sum())

    def add(self, other: DistanceTally) -> None:
        """Take in another group's entries."""
        self._entries += other._entries
        self._moved += other._moved
        self._isolated += other._isolated
        self._squares += other._squares
        self._isolated_squares += other._isolated_squares
        self._norm += other._norm
        if other._largest > self._largest:
            self._largest, self._largest_in = other._largest, other._largest_in

    @property
    def distance(self) -> Distance | None:
        """How far the entries have moved; None where there are none."""
        if not self._entries:
            return None
        there = math.sqrt(self._squares)
        return Distance(
            entries=self._entries,
            moved=self._moved,
            rms=math.sqrt(self._squares / self._entries),
            relative=there / math.sqrt(self._norm) if self._norm else (math.inf if there else 0.0),
            largest=self._largest,
            largest_in=self._largest_in,
            isolated_rms=math.sqrt(self._isolated_squares / self._isolated) if self._isolated else None,
        )


class Origin(Protocol):
    """Where weights began."""

    @property
    def label(self) -> str:
        """What it is, for people."""

    def has(self, segment: Segment) -> bool:
        """Whether a parameter of this name and shape is there."""

    def read(self, segment: Segment) -> Tensor:
        """Return a slice of a parameter. [real_numel] fp32, CPU"""


class AnchorOrigin:
    """What the shards of a tag hold of an anchor."""

    def __init__(self, shards: TagShards, anchor: SavedAnchor) -> None:
        self._shards = shards
        when = "the run's first step" if anchor.to == RUN else "the first step of the stage"
        self.label = f"the weights before {when} (the anchor in the checkpoint)"

    def has(self, segment: Segment) -> bool:
        """See `Origin`. An anchor covers what isolation covers."""
        return True

    def read(self, segment: Segment) -> Tensor:
        """See `Origin`."""
        return decode(self._shards.stored(ANCHOR_STATE, segment))


class FolderOrigin:
    """A folder of safetensors, as the model was made of them."""

    def __init__(self, folder: Path, *, dtype: torch.dtype, label: str) -> None:
        """``dtype`` is the model's: what a file holds in more bits was rounded to it when training began.

        Raises UserError for a folder without safetensors, and for one that is not whole.
        """
        self._folder, self._dtype, self.label = WeightsFolder(folder), dtype, label

    def has(self, segment: Segment) -> bool:
        """See `Origin`."""
        return self._folder.problem_with(segment.name, segment.shape) is None

    def check(self, segments: tuple[Segment, ...]) -> None:
        """Raise UserError where the folder has none of the parameters."""
        if not any(self.has(segment) for segment in segments):
            first = segments[0]
            raise UserError(
                f"{self._folder.folder} has no parameter of the checkpoint "
                f"({self._folder.problem_with(first.name, first.shape)}); give the folder of the model that training "
                "began with (--base)"
            )

    def read(self, segment: Segment) -> Tensor:
        """See `Origin`."""
        first = segment.global_start
        return self._folder.read(segment.name, first, first + segment.real_numel).to(self._dtype).float()
