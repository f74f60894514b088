"""`code_histogram_` in C++: the integers of the plain torch implementation."""

from __future__ import annotations

import pytest
import torch

from epi_ds.kernels.cpu.code_histogram import code_histogram_ as compiled
from epi_ds.kernels.reference.code_histogram import NUM_CODES
from epi_ds.kernels.reference.code_histogram import code_histogram_ as reference
from tests.support.operations import SIZES, runnable_variants, state_of


@pytest.mark.parametrize("variant", runnable_variants())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint16])
@pytest.mark.parametrize("numel", SIZES)
def test_counts_are_those_of_the_reference(variant: str, dtype: torch.dtype, numel: int) -> None:
    codes = state_of(dtype, numel, 0).codes
    expected = torch.arange(NUM_CODES)
    found = expected.clone()
    extremes = reference(expected, codes)
    numbers = codes.view(torch.int16).int() & 0xFFFF
    assert extremes.tolist() == ([int(numbers.min()), int(numbers.max())] if numel else [NUM_CODES, -1])
    assert int((expected - torch.arange(NUM_CODES)).sum()) == numel
    for num_threads in (1, 2, 3, 4):
        assert torch.equal(compiled(found, codes, variant=variant, num_threads=num_threads), extremes)
        assert torch.equal(found - torch.arange(NUM_CODES), (expected - torch.arange(NUM_CODES)) * num_threads)


def test_the_operation_is_registered_as_it_behaves() -> None:
    args = (torch.zeros(NUM_CODES, dtype=torch.int64), state_of(torch.bfloat16, 300, 0).codes.clone())
    torch.library.opcheck(torch.ops.epi_ds.code_histogram_, args, test_utils=("test_schema", "test_faketensor"))
