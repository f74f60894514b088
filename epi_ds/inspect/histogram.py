"""Histograms of importance as lines of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from epi_ds.inspect.tally import Octave

_BLOCKS = "▁▂▃▄▅▆▇█"


class Axis(NamedTuple):
    """Bins of equal width in the logarithm. Importance of zero, and below 2^-126, is in none of them."""

    first: int
    """Exponent of two at which the first one begins."""
    width: int
    """Octaves in a bin."""
    bins: int

    @property
    def floors(self) -> tuple[float, ...]:
        """Where each bin begins."""
        return tuple(2.0 ** (self.first + index * self.width) for index in range(self.bins))

    def counts(self, octaves: Sequence[Octave]) -> list[tuple[int, int]]:
        """Return entries and isolated entries of every bin."""
        found = [(0, 0)] * self.bins
        for octave in octaves:
            if octave.floor:
                index = (_exponent(octave) - self.first) // self.width
                entries, isolated = found[index]
                found[index] = entries + octave.entries, isolated + octave.isolated
        return found


def axis_of(octaves: Sequence[Octave], *, at_most: int) -> Axis:
    """Return the axis that holds some octaves in at most so many bins."""
    exponents = [_exponent(octave) for octave in octaves if octave.floor and octave.entries]
    if not exponents:
        return Axis(0, 1, 0)
    first, octaves_held = min(exponents), max(exponents) - min(exponents) + 1
    width = -(-octaves_held // at_most)
    return Axis(first, width, -(-octaves_held // width))


def _exponent(octave: Octave) -> int:
    return math.frexp(octave.floor)[1] - 1


def sparkline(counts: Sequence[int]) -> str:
    """Return counts as a line of blocks, the largest as a full one, and a space where there is nothing."""
    largest = max(counts, default=0)
    return "".join(" " if not count else _BLOCKS[(count * len(_BLOCKS) - 1) // largest] for count in counts)


def bar(count: int, *, largest: int, width: int) -> str:
    """Return a count as a bar, ``width`` for the largest, and one for the smallest that is not nothing."""
    return "" if not count else "█" * max(1, round(count / largest * width))
