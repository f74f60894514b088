"""One pull of a flat partition: by how much its entries are pulled, and by which operation.

[Note: cost] An entry's own factor takes a root, a product in fp64 and an exponential, ten times what the pull itself
does. So where omega is a function of 16-bit codes, the factors of all codes are computed first, in the same way and to
the same bits, and looked up in the pass that pulls. Where it is not (``state: fp32`` and ``u8``), factors are computed
of so few entries at a time that what lies between stays in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from epi_ds.choices import Pull
from epi_ds.isolation.anchor.by_code import ByCode, by_code
from epi_ds.isolation.anchor.strength import share_of
from epi_ds.isolation.importance.mean import Divided
from epi_ds.isolation.layout import Segment, parts_within
from epi_ds.isolation.placement import Placement
from epi_ds.kernels import chunks, pull_, pull_by_code_

# Entries whose factors the host computes at once: in fp64 they take half of a second cache.
_HOST_NUMEL = 1 << 16


class Part(NamedTuple):
    """Neighbouring entries of a flat partition, all of them covered; what is pulled, and towards what."""

    start: int
    """Where they begin in the partition."""
    target: Tensor
    """fp32, mutated; see `epi_ds.kernels.pull_`."""
    weights: Tensor
    anchor: Tensor
    source: Tensor | None = None
    """What the target becomes when it is pulled, where that is not the target itself."""

    def within(self, first: int, last: int) -> Part:
        """Return entries ``[first, last)`` of the partition."""
        own = slice(first - self.start, last - self.start)
        source = None if self.source is None else self.source[own]
        return Part(first, self.target[own], self.weights[own], self.anchor[own], source)


class Pulling(Protocol):
    """A pull of one flat partition, in as many parts as its caller likes."""

    def pull_(self, part: Part) -> None:
        """Pull the target of a part, in place."""


def pulling(pull: Pull, size: float, omega: Divided | None, *, sub_group: int, placement: Placement) -> Pulling:
    """Return a pull of a sub-group's partition.

    size   the exponent of a decoupled pull, or the factor of one in the gradient, at omega 1
    omega  of every entry; None where it is 1
    """
    if omega is None:
        return _Uniform(_factor(pull, size))
    device = placement.devices[sub_group]
    tables = by_code(omega, device)
    if tables:
        factors = torch.stack([_factors(pull, table.values.mul_(size)) for table in tables])
        return _ByCode(tables, factors, sub_group)
    return _ByEntry(pull, size, omega, placement.layout.by_sub_group[sub_group])


@dataclass(frozen=True)
class _Uniform:
    factor: float

    def pull_(self, part: Part) -> None:
        pull_(part.target, part.weights, part.anchor, self.factor, source=part.source)


@dataclass(frozen=True)
class _ByCode:
    tables: Sequence[ByCode]
    factors: Tensor
    """[len(tables), 65536]"""
    sub_group: int

    def pull_(self, part: Part) -> None:
        stop = part.start + part.target.numel()
        codes = [table.stored.codes_within(self.sub_group, part.start, stop) for table in self.tables]
        pull_by_code_(part.target, part.weights, part.anchor, codes, self.factors, source=part.source)


@dataclass(frozen=True)
class _ByEntry:
    pull: Pull
    size: float
    omega: Divided
    segments: Sequence[Segment]

    def pull_(self, part: Part) -> None:
        stop = part.start + part.target.numel()
        # An accelerator has smaller caches, and every launch takes as long as many entries.
        numel = _HOST_NUMEL if part.target.device.type == "cpu" else stop - part.start
        for segment, first, last in parts_within(self.segments, part.start, stop):
            for start, end in chunks(first, last, numel):
                sizes = self.omega.read(segment, start - segment.start, end - segment.start).mul_(self.size)
                of = part.within(start, end)
                pull_(of.target, of.weights, of.anchor, _factors(self.pull, sizes), source=of.source)


def _factor(pull: Pull, size: float) -> float:
    """Return what the way to the anchor is multiplied by. See [Note: strength] in strength.py."""
    return -share_of(size) if pull is Pull.UPDATE else size


def _factors(pull: Pull, sizes: Tensor) -> Tensor:
    """Return `_factor` of every entry; ``sizes`` are overwritten."""
    return sizes.neg_().expm1_() if pull is Pull.UPDATE else sizes
