"""What tests of the operations share: the instruction sets there are, and values that are hard to get right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from epi_ds.kernels import Run, Stored, num_blocks, observe_, pack_bits, table_of
from epi_ds.kernels.cpu.build import library, variants
from epi_ds.kernels.reference.encode import encode_

STATES = [torch.float32, torch.bfloat16, torch.uint16, torch.uint8]
# Around a block of 256, a prime, and many blocks; empty ones too.
SIZES = [0, 1, 255, 256, 257, 1009, 2**20 + 3]


def runnable_variants() -> list[str]:
    """Instruction sets that this machine can run: what it has, and all below."""
    return list(variants()[: variants().index(library().epi_isa().decode()) + 1])


def values_of(numel: int) -> Tensor:
    """Many scales, zeros, a denormal, the largest finite number."""
    generator = torch.Generator().manual_seed(numel)
    values = torch.randn(numel, generator=generator).mul(3).exp()
    values[torch.rand(numel, generator=generator) < 0.1] = 0.0
    if numel > 250:
        values[5], values[200] = torch.finfo(torch.float32).max, 2.0**-149
    return values


def values_around_codes(repeats: int) -> Tensor:
    """Where rounding to uint8 is a matter of one unit: what codes stand for, and where roots come out whole.

    Few random numbers tell one rule for these from another, so they are many. [repeats * 1792]
    """
    squares = torch.arange(256).double().square()
    whole_roots = squares / (255**2 * (1 + 2.0**-21))
    units = torch.arange(-3, 3).double().unsqueeze(1)
    values = torch.cat([squares.unsqueeze(0) / 255**2, whole_roots * (1 + units * 2.0**-24)])
    # The largest value of a block is what its codes are relative to.
    values[:, -1] = 1.0
    return values.float().flatten().repeat(repeats)


def stored_of(dtype: torch.dtype, values: Tensor, first_index: int) -> Stored:
    """Values as they are stored, in memory that begins one entry behind an aligned address."""
    numel = values.numel()
    codes = torch.zeros(numel + 1, dtype=dtype)[1:]
    stored = Stored(codes, torch.zeros(num_blocks(first_index, numel) if dtype is torch.uint8 else 0), first_index)
    encode_(stored, values, key=3, step=0)
    return stored


def state_of(dtype: torch.dtype, numel: int, first_index: int) -> Stored:
    """`values_of`, stored."""
    return stored_of(dtype, values_of(numel), first_index)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, bit for bit."""
    return one.dtype is other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def table_for(stored: Stored, *, key: int = 0) -> Tensor:
    """The table of a gradient that belongs to one run, whose storage is all there is."""
    return table_of([Run(0, stored.codes.numel(), 0, 0, stored.first_index, key)], device=stored.codes.device)


def observe_run(stored: Stored, gradient: Tensor | None, *, key: int = 0, **settings: Any) -> None:
    """`observe_` of one run."""
    observe_(stored.codes, stored.scales, gradient, table_for(stored, key=key), **settings)


def mask_of(numel: int, share: float = 0.2) -> Tensor:
    """A random mask. [numel] bool"""
    return torch.rand(numel, generator=torch.Generator().manual_seed(numel + 1)) < share


def bits_of(mask: Tensor) -> Tensor:
    """The same as bits."""
    bits = torch.full((-(-mask.numel() // 8),), 255, dtype=torch.uint8)
    pack_bits(mask, bits)
    return bits
