"""The mean loss of every source's tokens between two lines of the metrics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class SourceLosses:
    """Sums the losses of tokens by their source on every rank, and over all ranks where they are asked for."""

    def __init__(self, sources: Sequence[str]) -> None:
        """``sources`` are their names, by their numbers."""
        self._sources = tuple(sources)
        # Losses and tokens of every source. In double precision: 2^24 tokens are soon seen.
        self._sums: Tensor | None = None

    def add(self, losses: Tensor, sources: Tensor, is_learnt: Tensor) -> None:
        """Add the tokens of a micro-batch: three tensors of one form, on one device. Nothing waits for the device."""
        numbers = torch.arange(len(self._sources), device=losses.device)[:, None, None]
        own = (sources == numbers) & is_learnt
        # A sum for each and no scattered additions, whose order a GPU changes from run to run.
        found = torch.stack((torch.where(own, losses.detach().double(), 0.0).sum((1, 2)), own.sum((1, 2)).double()))
        self._sums = found if self._sums is None else self._sums + found

    def take(self) -> dict[str, float]:
        """Return the mean loss of every source that had tokens since the last call, and begin anew. Collective.

        One reduction of two numbers for each source.
        """
        if self._sums is None:
            return {}
        sums, self._sums = self._sums, None
        dist.all_reduce(sums)
        losses, tokens = sums.tolist()
        return {
            name: loss / count for name, loss, count in zip(self._sources, losses, tokens, strict=True) if count > 0
        }
