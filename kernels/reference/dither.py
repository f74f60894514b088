"""The random numbers of stochastic rounding: a function of where and when, never of who computes it.

[Note: dither] Nearest rounding stalls: once an average changes by less than half a code per step, it stops changing. So
coded importance is rounded up with a probability equal to the share of the way to the next code, which is right on
average. The random number of an entry is a hash of (key, index) that then advances by the golden ratio's fraction of
the circle each step. At any one step these numbers are as good as independent; along the steps of one entry they are
spread evenly, so the errors of successive roundings cancel where independent ones would add up to a random walk.
They depend on the parameter, the entry and the step alone: no generator has a state to save, and neither the number of
ranks nor of threads changes them. 16 bits are enough for any code, so one hash of 32 serves two neighbouring entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epi_ds.kernels.reference.codecs import LARGEST_FINITE

# 2^32 / golden ratio, odd: the most even spread that adding a constant can give.
_GOLDEN = 0x9E3779B9


def phase(step: int) -> int:
    """Return the 16 bits by which all random numbers have advanced at a step."""
    return (step * _GOLDEN & 0xFFFFFFFF) >> 16


def _int32(value: int) -> int:
    """Return the int32 with the same 32 low bits."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def _xor_shifted(values: Tensor, distance: int) -> Tensor:
    """Return ``values ^ (values >> distance)`` of unsigned 32-bit numbers held as int32."""
    # int32 shifts copy the sign: cut off what came in from the left.
    return values ^ ((values >> distance) & ((1 << (32 - distance)) - 1))


def _mixed(numbers: Tensor, key: int) -> Tensor:
    """Return 32 random bits for each int64 number, as int32: MurmurHash3's finaliser."""
    # The upper half of a number matters from 2^32 on.
    mixed = (numbers * _GOLDEN + (numbers >> 32)).to(torch.int32) + _int32(key)
    mixed = _xor_shifted(mixed, 16) * _int32(0x85EBCA6B)
    mixed = _xor_shifted(mixed, 13) * _int32(0xC2B2AE35)
    return _xor_shifted(mixed, 16)


def random_codes(key: int, first_index: int, numel: int, *, device: torch.device) -> Tensor:
    """Return one uniform code of a positive finite fp32 number per entry. [numel] int32 in [1, 0x7F7FFFFF].

    The same for an entry wherever a parameter is cut. A product of 32 and 31 bits scales the hash: no entry is drawn
    again, as a rejection would.

    key          of the parameter and the draw, 32 bits
    first_index  of the first entry in the flattened parameter
    """
    bits = _mixed(torch.arange(first_index, first_index + numel, device=device), key).long() & 0xFFFFFFFF
    return (bits * LARGEST_FINITE >> 32).to(torch.int32) + 1


def dither(key: int, first_index: int, numel: int, *, step: int, device: torch.device) -> Tensor:
    """Return one uniform 16-bit number per entry. [numel] int32 in [0, 2^16). See [Note: dither].

    key          of the parameter, 32 bits
    first_index  of the first entry in the flattened parameter
    step         number of the observation
    """
    first_pair, last_pair = first_index >> 1, first_index + numel + 1 >> 1
    pair = torch.arange(first_pair, last_pair, device=device)
    mixed = _mixed(pair, key)
    halves = torch.stack([mixed, mixed >> 16], dim=1).view(-1) + phase(step) & 0xFFFF
    return halves[first_index - 2 * first_pair :][:numel]
