"""What a refresh selected and found, over all ranks: the numbers of the paper's tables 11 and 12, and more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from epi_ds.isolation.importance.codes import decode
from epi_ds.isolation.importance.tasks import TaskShare
from epi_ds.isolation.search.sketch import Extremes


class GroupCounts(NamedTuple):
    """Isolated entries of one group of parameters: a layer, or a kind of matrix."""

    name: str
    numel: int
    isolated: int
    kept: int
    """Isolated both before and now."""
    before: int
    """Isolated before."""

    @property
    def achieved_ratio(self) -> float:
        """Isolated share of the group's entries."""
        return self.isolated / self.numel if self.numel else 0.0

    @property
    def flip_rate(self) -> float | None:
        """Share of what was isolated before that was released; None where nothing was.

        The paper's table 12 does not say what its flip rate is a share of.
        """
        return 1.0 - self.kept / self.before if self.before else None


class LayerImportance(NamedTuple):
    """Importance of one layer, as selection compared it."""

    threshold: float
    """Entries at or above it are isolated; inf isolates none."""
    smallest: float
    largest: float
    largest_in: str
    """Name of the parameter that holds the largest entry."""


class Refresh(NamedTuple):
    """What a refresh selected, over all ranks. The same on every rank. Counts are of entries."""

    step: int
    """Applied steps before the refresh."""
    ratio: float
    """The one requested at this step."""
    budget: int
    """Most entries that the ratio allows."""
    isolated: int
    covered: int
    tied_mass: int
    """Entries that the next smaller threshold would isolate on top; see `Thresholds.tied_mass`."""
    layers: tuple[GroupCounts, ...]
    kinds: tuple[GroupCounts, ...]
    """By kind of matrix: all query projections, all norms, ..."""
    importance: tuple[LayerImportance, ...]
    """In the order of ``layers``."""
    tasks: tuple[TaskShare, ...]
    """What each task has of the mask, where several share the budget (``memory: per_task``)."""
    jaccard_first: float | None
    """Overlap with the first mask of the run that isolated anything, estimated from one entry in 16 (table 11)."""
    held_gradient_energy: float | None
    """``1 - |masked g|^2 / |g|^2``, mean over the steps under a mask since the last refresh; None without one."""
    held_step_energy: float | None
    """The same of the optimizer's update, under ``apply: update``, from a sample of the entries. The ranks hear of an
    update in the next step, so it is over the steps up to the last but one, and that of the window before."""
    seconds: float
    collectives: int
    sent_bytes: int
    """By this rank, by the model of `epi-ds estimate`."""

    @property
    def achieved_ratio(self) -> float:
        """Isolated share of the covered entries."""
        return self.isolated / self.covered

    @property
    def jaccard(self) -> float | None:
        """Overlap of the masks before and now (intersection over union); None where there was no mask before."""
        before, kept = (sum(getattr(layer, field) for layer in self.layers) for field in ("before", "kept"))
        return kept / (before + self.isolated - kept) if before else None


def layer_importance(
    threshold_codes: Tensor, extremes: Extremes, parameter_names: tuple[str, ...]
) -> tuple[LayerImportance, ...]:
    """Return the importance of every layer; of a layer without entries zeros, and an empty name.

    threshold_codes  [num_layers] int64, CPU
    parameter_names  of the covered parameters, by index
    """
    columns = [values_of(codes.clamp(min=0)) for codes in (threshold_codes, extremes.min_codes, extremes.max_codes)]
    holders = [parameter_names[index] if index >= 0 else "" for index in extremes.holders.tolist()]
    return tuple(LayerImportance(*row) for row in zip(*columns, holders, strict=True))


def values_of(codes: Tensor) -> list[float]:
    """Return the values of int64 codes; inf for what no finite importance reaches."""
    # decode() reads the pattern of +inf as 2^128.
    return [value if value < 2.0**128 else math.inf for value in decode(codes).tolist()]


class FirstMask:
    """One entry in 16 of the first mask that isolated anything, to compare later ones with.

    A whole copy would cost an eighth of a byte per parameter, as much as the mask itself.
    """

    STRIDE = 16

    def __init__(self) -> None:
        self._sample: list[Tensor] | None = None

    def compare(self, masks: list[Tensor]) -> Tensor:
        """Return how many sampled entries are isolated both times, and either time. [2] int64 on the CPU, this rank's.

        masks  uint8 bits by sub-group
        """
        counts = torch.zeros(2, dtype=torch.int64)
        for first, bits in zip(self._sample or (), masks, strict=False):
            now = bits[:: self.STRIDE]
            counts += torch.stack([_count(first & now), _count(first | now)]).cpu()
        return counts

    def keep(self, masks: list[Tensor]) -> None:
        """Take the sample, unless there is one."""
        if self._sample is None:
            self._sample = [bits[:: self.STRIDE].clone() for bits in masks]

    @property
    def sample(self) -> list[Tensor]:
        """The sampled bytes by sub-group; empty before the first mask."""
        return self._sample or []

    def restore(self, sample: Sequence[Tensor], devices: Sequence[torch.device]) -> None:
        """Continue with a saved sample."""
        self._sample = [bits.to(device) for bits, device in zip(sample, devices, strict=True)] if sample else None


def _count(sampled: Tensor) -> Tensor:
    ones = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.int64, device=sampled.device)
    return ones[sampled.int()].sum()
