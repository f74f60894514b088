"""`encode_` in C++: the bits of the plain torch implementation."""

from __future__ import annotations

import pytest
import torch

from epi_ds.kernels import Stored, num_blocks
from epi_ds.kernels.cpu.encode import encode_ as compiled
from epi_ds.kernels.reference.encode import encode_ as reference
from tests.support.covering import covering
from tests.support.operations import (
    SIZES,
    STATES,
    runnable_variants,
    same_bits,
    state_of,
    values_around_codes,
    values_of,
)


def blank(dtype: torch.dtype, numel: int, first_index: int) -> Stored:
    blocks = num_blocks(first_index, numel) if dtype is torch.uint8 else 0
    return Stored(torch.full((numel + 1,), 1, dtype=dtype)[1:], torch.ones(blocks), first_index)


@pytest.mark.parametrize(
    ("variant", "dtype", "numel", "num_threads"),
    covering(runnable_variants(), STATES, SIZES, [1, 2, 3, 4], strength=3),
)
def test_bits_are_those_of_the_reference(variant: str, dtype: torch.dtype, numel: int, num_threads: int) -> None:
    for first_index in (0, 77, 2**34 - 100)[: 3 if numel < 2**20 else 1]:
        expected, found = blank(dtype, numel, first_index), blank(dtype, numel, first_index)
        reference(expected, values_of(numel), key=0xF0000001, step=3)
        compiled(found, values_of(numel), key=0xF0000001, step=3, variant=variant, num_threads=num_threads)
        assert same_bits(expected.codes, found.codes)
        assert same_bits(expected.scales, found.scales)


@pytest.mark.parametrize("variant", runnable_variants())
def test_values_around_codes_are_rounded_as_by_the_reference(variant: str) -> None:
    """Another rule for roots would give other codes here."""
    values = values_around_codes(repeats=700)
    expected, found = blank(torch.uint8, len(values), 0), blank(torch.uint8, len(values), 0)
    reference(expected, values, key=5, step=3)
    compiled(found, values, key=5, step=3, variant=variant)
    assert same_bits(expected.codes, found.codes)
    # A value that a code stands for keeps it.
    exact = expected.codes.view(700, 7, 256)[:, 0]
    assert torch.equal(exact, torch.arange(256).to(torch.uint8).expand(700, 256))


@pytest.mark.parametrize("dtype", STATES)
def test_values_that_are_not_in_one_piece(dtype: torch.dtype) -> None:
    values = values_of(2 * 70_001)[::2]
    expected, found = blank(dtype, len(values), 0), blank(dtype, len(values), 0)
    reference(expected, values.clone(), key=5, step=3)
    compiled(found, values, key=5, step=3)
    assert same_bits(expected.codes, found.codes)
    with pytest.raises(ValueError, match="values has 5 entries"):
        compiled(found, values[:5], key=5, step=3)
    with pytest.raises(ValueError, match=r"of torch\.float64"):
        compiled(found, values.double(), key=5, step=3)


@pytest.mark.parametrize("dtype", STATES)
def test_the_operation_is_registered_as_it_behaves(dtype: torch.dtype) -> None:
    stored = state_of(dtype, 300, 0)
    stored = stored._replace(codes=stored.codes.clone())
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.epi_ds.encode_, (*stored, values_of(300), 3, 4), test_utils=checks)
