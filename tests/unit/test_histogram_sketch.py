"""Importance counted by code answers what importance read entry by entry does."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from epi_ds.choices import Normalizer, Selection
from epi_ds.isolation.search.histogram_sketch import HistogramSketch, StoredCodes
from epi_ds.isolation.search.sketch import PartitionSketch, SegmentCodes, Sketch, read_extremes
from epi_ds.isolation.search.threshold import find_thresholds
from epi_ds.kernels import Stored, decode
from tests.support.worlds import CountingExchange, World

SHIFTS = {torch.uint16: 15, torch.bfloat16: 16}
# Of three layers' parameters on two ranks; the last layer has no entries anywhere.
SIZES = ([(0, 1009), (0, 0), (0, 1), (1, 257), (3, 0)], [(0, 3), (1, 0), (2, 400_003), (3, 0)])


def codes_of(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Many scales, zeros, denormals, ties, and the largest finite value."""
    rng = np.random.default_rng(seed)
    values = np.exp(rng.normal(0, 4, numel)).astype(np.float32)
    values[rng.random(numel) < 0.1] = 0.0
    values[5:9] = [2.0**-149, 2.0**-127, np.finfo(np.float32).max, 1.0][: max(0, numel - 5)]
    patterns = torch.from_numpy(values).view(torch.int32) >> SHIFTS[dtype]
    return patterns.to(torch.int16).view(dtype)


def patterns_of(codes: Tensor) -> list[Tensor]:
    return [decode(Stored(codes, torch.zeros(0), 0)).view(torch.int32)]


def sketches(dtype: torch.dtype) -> tuple[list[Sketch], list[Sketch]]:
    """Both kinds for both ranks."""
    counted: list[Sketch] = []
    read: list[Sketch] = []
    for rank, sizes in enumerate(SIZES):
        codes = [codes_of(numel, dtype, seed=10 * rank + i) for i, (_, numel) in enumerate(sizes)]
        by_code = [StoredCodes(layer, i, codes[i]) for i, (layer, _) in enumerate(sizes)]
        by_entry = [SegmentCodes(layer, i, partial(patterns_of, codes[i])) for i, (layer, _) in enumerate(sizes)]
        counted.append(HistogramSketch(by_code, num_layers=4, code_shift=SHIFTS[dtype]))
        read.append(PartitionSketch(by_entry, num_layers=4))
    return counted, read


@pytest.mark.parametrize("dtype", SHIFTS)
def test_every_question_has_the_same_answer(dtype: torch.dtype) -> None:
    for counted, read in zip(*sketches(dtype), strict=True):
        assert torch.equal(counted.extremes(), read.extremes())
        max_codes = read_extremes(read.extremes()).max_codes.clamp(min=0)
        # Where another rank holds the largest value, too.
        for largest in (max_codes, torch.full_like(max_codes, 0x7F000000)):
            assert torch.equal(counted.fixed_point_sums(largest), read.fixed_point_sums(largest))
        some = max_codes.unsqueeze(1) + torch.arange(-3, 4) * (1 << SHIFTS[dtype])
        grid = torch.arange(1, 2041).mul(1 << 20).expand(4, -1)
        for edges in (some.clamp(min=0), grid, torch.zeros(4, 1, dtype=torch.int64)):
            for counts in (torch.int32, torch.int64):
                assert torch.equal(counted.counts(edges, dtype=counts), read.counts(edges, dtype=counts))
        # What was merged may be overwritten by a collective: the sketch must not be.
        counted.extremes().zero_()
        assert torch.equal(counted.extremes(), read.extremes())


@pytest.mark.parametrize("dtype", SHIFTS)
@pytest.mark.parametrize("normalizer", Normalizer)
@pytest.mark.parametrize("selection", Selection)
def test_a_search_finds_the_same(dtype: torch.dtype, selection: Selection, normalizer: Normalizer) -> None:
    numel = tuple(sum(n for sizes in SIZES for layer, n in sizes if layer == index) for index in range(4))
    found = [
        find_thresholds(
            World(ranks),
            CountingExchange(),
            ratio=0.05,
            layer_numel=numel,
            selection=selection,
            normalizer=normalizer,
            code_shift=SHIFTS[dtype],
        )
        for ranks in sketches(dtype)
    ]
    assert torch.equal(found[0].codes, found[1].codes)
    assert found[0].tied_mass == found[1].tied_mass
    assert found[0].budget > 0
