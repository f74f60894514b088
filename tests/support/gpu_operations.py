"""What tests of the GPU operations share: where they run, and partitions and masks that are hard to get right."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from epi_ds.kernels.reference.codecs import Stored
from epi_ds.kernels.reference.runs import Run, table_of
from tests.support.operations import stored_of, values_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

# Around a block of 256, a prime, more than a tile; empty ones too.
SIZES = [0, 1, 255, 256, 257, 1009, 4096 + 3]
# On and off a border of a block, odd, and where the upper half of the index counts.
FIRST_INDICES = [0, 1, 77, 2**34 - 100]


class Partition(NamedTuple):
    """Runs of several parameters, of which every other one has no importance, and the table of them."""

    codes: Tensor
    scales: Tensor
    gradient: Tensor
    runs: list[Run]

    @property
    def table(self) -> Tensor:
        return table_of(self.runs, device=self.codes.device)

    def clone(self, device: torch.device) -> Partition:
        """Return a copy on a device."""
        # Not every operation knows uint16.
        codes = self.codes.view(torch.uint8).to(device, copy=True).view(self.codes.dtype)
        scales, gradient = (tensor.to(device, copy=True) for tensor in (self.scales, self.gradient))
        return Partition(codes, scales, gradient, self.runs)


def special_values(numel: int) -> Tensor:
    """`values_of`, with blocks that are zeros, all equal, denormal, and at the least scale there is."""
    values = values_of(numel)
    for block, value in enumerate((0.0, 0.75, 2.0**-140, 2.0**-110, 2.0**-111)):
        values[(2 * block + 1) * 256 : (2 * block + 2) * 256] = value
    return values


def special_gradient(numel: int) -> Tensor:
    """Many scales, zeros, and numbers whose square is none, or none that fp32 has."""
    generator = torch.Generator().manual_seed(numel)
    gradient = torch.randn(numel, generator=generator) * torch.randn(numel, generator=generator).mul(3).exp()
    gradient[torch.rand(numel, generator=generator) < 0.1] = 0.0
    specials = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, 1e-30, -(2.0**-149)])
    gradient[7 : 7 + len(specials)] = specials[: max(0, numel - 7)]
    return gradient


def partition_of(dtype: torch.dtype) -> Partition:
    """Return a partition of every size at every first index.

    Between what is stored of two runs lies one entry, and one scale, that no run has.
    """
    codes, scales, gradients, runs = [], [], [], []
    start = first_code = first_block = 0
    for number, (first_index, numel) in enumerate((first, size) for first in FIRST_INDICES for size in SIZES):
        stored = stored_of(dtype, special_values(numel), first_index)
        gap = 1 + number % 5
        runs += [
            Run(start, numel, first_code, first_block, first_index, 0xF0000001 + number),
            Run(start + numel, gap, -1, 0, number, 0),
        ]
        codes += [stored.codes.view(torch.uint8), torch.full((dtype.itemsize,), 7, dtype=torch.uint8)]
        scales += [stored.scales, torch.tensor([7.0])]
        gradients.append(special_gradient(numel + gap))
        start += numel + gap
        first_code += numel + 1
        first_block += stored.scales.numel() + 1
    return Partition(torch.cat(codes).view(dtype), torch.cat(scales), torch.cat(gradients), runs)


def moved(stored: Stored) -> Stored:
    """Return a copy of what is stored on the device under test, again one entry behind an aligned address."""
    codes = stored.codes.view(torch.uint8)
    room = torch.zeros(codes.numel() + stored.codes.element_size(), dtype=torch.uint8, device=DEVICE)
    room = room[stored.codes.element_size() :]
    room.copy_(codes)
    return Stored(room.view(stored.codes.dtype), stored.scales.to(DEVICE, copy=True), stored.first_index)


def same_but_for_nan(one: Tensor, other: Tensor) -> bool:
    """Whether two fp32 tensors are equal, bit for bit; processors differ in which NaN they make, so any equals any."""
    numbers = ~one.isnan()
    return torch.equal(numbers, ~other.isnan()) and torch.equal(
        one[numbers].view(torch.int32), other[numbers].view(torch.int32)
    )
