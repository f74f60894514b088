"""A sample of the first mask of a run, which every later one is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
        """Continue with a saved sample, by sub-group, on their homes; with an empty one as before the first mask."""
        self._sample = [bits.to(device) for bits, device in zip(sample, devices, strict=True)] if sample else None


def _count(sampled: Tensor) -> Tensor:
    """Return how many bits of some bytes are set. [] int64, where they are."""
    ones = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.int64, device=sampled.device)
    return ones[sampled.int()].sum()
