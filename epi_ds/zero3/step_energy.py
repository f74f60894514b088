"""How much of the optimizer's update a mask holds back, for ``apply: update``, where all of it is computed.

[Note: step energy] ``|held update|^2 / |update|^2`` needs the weights before and after the update. A copy of all of
them would take as much room as the weights, so the sums are over at most 2^14 entries of a sub-group, equally far
apart, from another offset in every step. The ranks' sums travel with the norm of the next step under a mask instead of
in a collective of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from epi_ds.isolation.layout import Span

SAMPLE_NUMEL = 1 << 14


class UpdateSample:
    """Some weights of one flat partition before an update."""

    def __init__(self, weights: Tensor, bits: Tensor, *, spans: Sequence[Span], step: int) -> None:
        """Take the sample of this step.

        weights  [numel]            fp32, copied in part
        bits     [ceil(numel / 8)]  uint8, the mask in force
        spans    of real entries, ascending, not touching: padding is memory that nobody has written to
        """
        self._stride = max(1, -(-weights.numel() // SAMPLE_NUMEL))
        entries = torch.arange(step % self._stride, weights.numel(), self._stride, device=weights.device)
        borders = torch.tensor([border for span in spans for border in span], device=weights.device)
        # Behind an odd number of borders lies the inside of a span.
        self._entries = entries[torch.bucketize(entries, borders, right=True) % 2 == 1]
        self._before = weights[self._entries]
        self._isolated = ((bits[self._entries >> 3] >> (self._entries & 7)) & 1).bool()

    def energies(self, weights: Tensor) -> Tensor:
        """Estimate the squared update of the isolated entries, and of all. [2] fp64, where ``weights`` are.

        weights  the same ones after the update, before isolated entries are restored
        """
        squares = (weights[self._entries].double() - self._before.double()).square_()
        return torch.stack([squares[self._isolated].sum(), squares.sum()]) * self._stride


class StepEnergy:
    """Energies of this rank that the others have not heard of yet."""

    def __init__(self, device: torch.device | str) -> None:
        self._pending = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, energies: Tensor) -> None:
        """Take in those of one sub-group."""
        self._pending += energies.to(self._pending.device)

    @property
    def pending(self) -> Tensor:
        """Sum of what was added since the last `settle`. [2] fp64."""
        return self._pending

    def settle(self) -> None:
        """Begin anew: all ranks know the sum."""
        self._pending = torch.zeros_like(self._pending)
