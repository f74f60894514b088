"""A sketch of 16-bit importance that reads every entry once, whatever is asked.

[Note: histograms] A search of four rounds, the extremes and the sums of the mean each ask about all entries. There are
some thousand different codes, so one pass that counts them answers everything: a refresh takes 0.3 ns an entry instead
of 1.9 on one core. What is kept are the codes in use, 8 bytes each: 30 kB a layer. Only of importance in the host's
memory: an accelerator reads memory faster than it adds to so few places.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from epi_ds.isolation.search.bracket import count_dtype
from epi_ds.isolation.search.sketch import add_fixed_point, empty_extremes, take_extremes
from epi_ds.kernels import code_histogram_

_NUM_CODES = 1 << 16


class StoredCodes(NamedTuple):
    """Stored 16-bit codes of one parameter on this rank."""

    layer: int
    parameter: int
    """Index of the parameter, the same on every rank."""
    codes: Tensor
    """[numel] bfloat16 or uint16, on the CPU. Not a copy."""


class _Histogram(NamedTuple):
    """The codes in use of one layer on this rank."""

    patterns: Tensor
    """[num_codes] int32, ascending: codes as fp32 patterns"""
    reached: Tensor
    """[num_codes + 1] entries at or above each, and the zero that is above all"""


class _Histograms(NamedTuple):
    by_layer: dict[int, _Histogram]
    extremes: Tensor


class HistogramSketch:
    """Answers as `PartitionSketch` does. Reads the codes at the first question; they must not change after it."""

    def __init__(self, segments: Sequence[StoredCodes], *, num_layers: int, code_shift: int) -> None:
        """A layer may have no segment, one or many; a code is a pattern without its lowest ``code_shift`` bits."""
        self._by_layer: dict[int, list[StoredCodes]] = {}
        for segment in segments:
            self._by_layer.setdefault(segment.layer, []).append(segment)
        self.num_layers = num_layers
        self._code_shift = code_shift

    @cached_property
    def _histograms(self) -> _Histograms:
        by_layer, extremes = {}, empty_extremes(self.num_layers)
        bins = torch.zeros(_NUM_CODES, dtype=torch.int64)
        for layer, segments in self._by_layer.items():
            lowest, highest = _NUM_CODES, -1
            for segment in segments:
                smallest, largest = code_histogram_(bins, segment.codes).tolist()
                if largest >= 0:
                    shifted = smallest << self._code_shift, largest << self._code_shift
                    take_extremes(extremes, *shifted, layer=layer, parameter=segment.parameter)
                lowest, highest = min(lowest, smallest), max(highest, largest)
            if highest >= 0:
                # Many layers are small: only what they may have touched is read and cleared.
                used = bins[lowest : highest + 1]
                by_layer[layer] = self._histogram(used, lowest)
                used.zero_()
        return _Histograms(by_layer, extremes)

    def _histogram(self, bins: Tensor, first_code: int) -> _Histogram:
        codes = torch.nonzero(bins).squeeze(1)
        reached = bins[codes].flip(0).cumsum(0).flip(0)
        reached = torch.cat([reached, torch.zeros(1, dtype=torch.int64)])
        patterns = (codes + first_code) << self._code_shift
        return _Histogram(patterns.int(), reached.to(count_dtype(int(reached[0]))))

    def extremes(self) -> Tensor:
        """See `PartitionSketch.extremes`."""
        return self._histograms.extremes.clone()

    def fixed_point_sums(self, max_codes: Tensor) -> Tensor:
        """See `PartitionSketch.fixed_point_sums`."""
        result = torch.zeros((2, self.num_layers), dtype=torch.int64)
        for layer, (patterns, reached) in self._histograms.by_layer.items():
            occurrences = -reached.long().diff()
            add_fixed_point(result, patterns, layer=layer, max_code=int(max_codes[layer]), occurrences=occurrences)
        return result

    def counts(self, edges: Tensor, *, dtype: torch.dtype = torch.int64) -> Tensor:
        """See `PartitionSketch.counts`."""
        result = torch.zeros(edges.shape, dtype=dtype)
        grids = edges.to(torch.int32)
        for layer, (patterns, reached) in self._histograms.by_layer.items():
            result[layer] = reached[torch.searchsorted(patterns, grids[layer])].to(dtype)
        return result
