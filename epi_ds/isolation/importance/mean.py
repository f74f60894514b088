"""The mean of an importance over all covered entries of all ranks, and importance divided by it.

[Note: exact means] A floating-point sum would depend on how entries are dealt to ranks. Here the integer significands
of all entries of one binade are added up as integers, which are merged over the ranks by SUM, and the mean is one
division of whole numbers, rounded once.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from epi_ds.isolation.importance.views import Importance, code_chunks
from epi_ds.isolation.layout import Layout, Segment
from epi_ds.isolation.search.exchange import Exchange

_FRACTION_BITS = 23
_FRACTION = (1 << _FRACTION_BITS) - 1
# Exponents of fp32 patterns whose sign bit is 0.
_NUM_EXPONENTS = 256
# The unit of a significand in the lowest binade.
_SMALLEST = Fraction(1, 1 << 149)


def significand_sums(importance: Importance, layout: Layout) -> Tensor:
    """Return the sums of this rank's significands by exponent. [256] int64 on the CPU; merge by SUM.

    Exact up to 2^39 entries over all ranks.
    """
    sums = torch.zeros(_NUM_EXPONENTS, dtype=torch.int64)
    for segment in layout.segments:
        for codes in code_chunks(importance, segment):
            wide = codes.long()
            exponents = wide >> _FRACTION_BITS
            significands = (wide & _FRACTION) | ((exponents > 0).long() << _FRACTION_BITS)
            # fp64 holds whole numbers up to 2^53: a chunk of 2^20 significands of 24 bits is far below.
            found = torch.bincount(exponents, weights=significands.double(), minlength=_NUM_EXPONENTS)
            sums += found.long().cpu()
    return sums


def mean_of(sums: Tensor, numel: int) -> float:
    """Return the mean of ``numel`` entries from the sums of all ranks, rounded once; 0 where all are zero."""
    units = sum(total << max(exponent - 1, 0) for exponent, total in enumerate(sums.tolist()))
    return float(units * _SMALLEST / numel)


def exact_mean(importance: Importance, layout: Layout, exchange: Exchange) -> float:
    """Return the mean over the covered entries of all ranks. Collective: one sum of 2 kB. The same on every rank."""
    return mean_of(exchange.total(significand_sums(importance, layout)), layout.covered_numel)


class Divided:
    """Importance over a mean, so that states of different gradients can be compared."""

    code_shift = 0
    """See `Importance.code_shift`: quotients are of all codes."""

    def __init__(self, importance: Importance, mean: float) -> None:
        """``mean`` 0 is that of zeros, which stay zeros."""
        self.importance = importance
        self._factor = 1.0 / mean if mean else 0.0

    def of(self, values: Tensor) -> Tensor:
        """Return what is read where the importance has these values; the caller's own to overwrite."""
        # In fp64, and rounded once: the mean of entries that fp32 cannot invert is no exception.
        return values.double().mul_(self._factor).clamp_(max=torch.finfo(torch.float32).max).float()

    def read(self, segment: Segment, start: int, stop: int) -> Tensor:
        """See `Importance.read`; the caller's own to overwrite."""
        return self.of(self.importance.read(segment, start, stop))
