"""Importance as integer codes. fp32 state: the code of a value is its bit pattern.

[Note: codes] Everything that is compared per entry is an integer code, and the order of codes is the order of values
(importance is never negative, so the sign bit is always 0). Conversions use integer shifts and normal-range fp64
only: with flush-to-zero enabled, native casts get thousands of denormal values wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The pattern of +infinity: above every finite value, so a threshold of TOP_CODE isolates nothing.
TOP_CODE = 0x7F800000

_FRACTION_BITS = 23
_SMALLEST_NORMAL_CODE = 1 << _FRACTION_BITS
# Re-biasing an fp32 pattern to an fp64 one: exponent bias 1023 - 127, fraction 52 - 23 bits wider.
_WIDER_BITS = 52 - _FRACTION_BITS
_REBIAS = (1023 - 127) << 52
_DENORMAL_UNIT = 2.0**-149


def codes_of(importance: Tensor) -> Tensor:
    """Return the codes of an fp32 importance tensor as int32, without copying. See [Note: codes]."""
    return importance.view(torch.int32)


def decode(codes: Tensor) -> Tensor:
    """Return the values of int64 codes as fp64, exactly. CPU only."""
    normal = ((codes << _WIDER_BITS) + _REBIAS).view(torch.float64)
    return torch.where(codes >= _SMALLEST_NORMAL_CODE, normal, codes.double() * _DENORMAL_UNIT)


def ceil_code(values: Tensor) -> Tensor:
    """Return the smallest int64 code whose value is at or above each fp64 value, at most `TOP_CODE`. CPU only.

    ``values`` must be non-negative and, unless zero, within fp64's normal range.
    """
    # Rounding the pattern up carries from the fraction into the exponent exactly where the value does.
    patterns = values.contiguous().view(torch.int64) - _REBIAS
    normal = (patterns + (1 << _WIDER_BITS) - 1) >> _WIDER_BITS
    denormal = torch.ceil(values.clamp(max=2.0**-126) / _DENORMAL_UNIT).long()
    return torch.where(values >= 2.0**-126, normal, denormal).clamp_(max=TOP_CODE)
