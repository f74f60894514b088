"""The reference operations against the plainest possible expressions."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from epi_ds.kernels import (
    count_bits,
    hold,
    mask_,
    masked_sumsq,
    restore_,
    set_bits,
    sketch_counts,
    slice_bits,
    unpack_bits,
)
from epi_ds.kernels.reference.chunks import CHUNK_NUMEL, chunks
from tests.support.operations import bits_of, mask_of

# 0, 1, around a byte, a prime, around a chunk.
SIZES = [0, 1, 7, 8, 9, 1009, CHUNK_NUMEL - 1, CHUNK_NUMEL, CHUNK_NUMEL + 3]


@pytest.mark.parametrize("numel", SIZES)
def test_bits_round_trip(numel: int) -> None:
    mask = mask_of(numel)
    bits = bits_of(mask)
    assert torch.equal(unpack_bits(bits, 0, numel), mask)
    assert count_bits(bits) == int(mask.sum())
    for start, stop in ((0, numel), (numel // 3, numel), (min(3, numel), min(20, numel))):
        assert torch.equal(unpack_bits(bits, start, stop), mask[start:stop])
        # A neighbour's bits, and those behind the last entry, are not carried along.
        assert torch.equal(slice_bits(bits, start, stop), bits_of(mask[start:stop]))


@pytest.mark.parametrize("numel", SIZES)
def test_hold_and_restore_keep_bits_through_anything(numel: int) -> None:
    mask = mask_of(numel)
    bits = bits_of(mask)
    values = torch.randn(numel)
    if numel > 2:
        values[0], values[1] = float("nan"), -0.0
    before = values.clone()
    held = hold(values, bits, int(mask.sum()))
    values.copy_(torch.randn(numel) * float("inf"))
    changed = values.clone()
    restore_(values, bits, held)
    # NaN and the sign of zero are part of the bits.
    assert torch.equal(values.view(torch.int32), torch.where(mask, before.view(torch.int32), changed.view(torch.int32)))


@pytest.mark.parametrize("numel", SIZES)
def test_mask_zeroes_isolated_entries_also_where_they_are_not_numbers(numel: int) -> None:
    mask = mask_of(numel)
    values = torch.full((numel,), float("nan"))
    values[~mask] = 2.0
    mask_(values, bits_of(mask))
    assert torch.equal(values, torch.where(mask, 0.0, 2.0))


@pytest.mark.parametrize("numel", SIZES)
def test_masked_sumsq(numel: int) -> None:
    mask = mask_of(numel)
    values = torch.randn(numel)
    for start, stop in ((0, numel), (numel // 3, numel)):
        squares = values[start:stop].double().square()
        expected = torch.stack([squares.sum(), squares[~mask[start:stop]].sum()])
        # The same fp64 numbers, summed in another order.
        found = masked_sumsq(values[start:stop], bits_of(mask), first_entry=start)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("numel", SIZES)
def test_sketch_counts_equal_comparisons(numel: int) -> None:
    generator = torch.Generator().manual_seed(numel)
    codes = torch.randint(0, 50, (numel,), generator=generator, dtype=torch.int32)
    for edges in (
        torch.arange(0, 60, 3),
        torch.tensor([7, 7, 7]),
        torch.tensor([49]),
        torch.tensor([0, 49, 49]),
    ):
        edges = edges.to(torch.int32)
        expected = torch.stack([(codes >= edge).sum() for edge in edges])
        assert torch.equal(sketch_counts(codes, edges), expected)


def test_setting_bits_leaves_their_neighbours_alone() -> None:
    numel = 2 * CHUNK_NUMEL + 13
    before = mask_of(numel)
    for start, length in ((0, 5), (3, 2), (11, CHUNK_NUMEL + 1), (numel - 9, 9), (7, 0)):
        bits = bits_of(before)
        mask = mask_of(length, share=0.5)
        set_bits(bits, mask, start)
        expected = before.clone()
        expected[start : start + length] = mask
        assert torch.equal(unpack_bits(bits, 0, numel), expected)


def test_chunks_cover_a_range_and_begin_at_bytes() -> None:
    pieces = list(chunks(5, 3 * CHUNK_NUMEL + 1))
    assert pieces[0][0] == 5
    assert pieces[-1][1] == 3 * CHUNK_NUMEL + 1
    assert all(before[1] == after[0] and after[0] % 8 == 0 for before, after in pairwise(pieces))
