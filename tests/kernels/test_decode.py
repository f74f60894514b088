"""`decode` in C++: the bits of the plain torch implementation."""

from __future__ import annotations

import pytest
import torch

from epi_ds.kernels import Stored, decode
from epi_ds.kernels.cpu.decode import decode as compiled
from epi_ds.kernels.reference.decode import decode as reference
from tests.support.operations import SIZES, STATES, runnable_variants, same_bits, state_of


@pytest.mark.parametrize("variant", runnable_variants())
@pytest.mark.parametrize("dtype", STATES)
@pytest.mark.parametrize("numel", SIZES)
def test_bits_are_those_of_the_reference(variant: str, dtype: torch.dtype, numel: int) -> None:
    for first_index in (0, 1, 77):
        stored = state_of(dtype, numel, first_index)
        expected = reference(stored)
        for num_threads in (1, 3):
            assert same_bits(compiled(stored, variant=variant, num_threads=num_threads), expected)


@pytest.mark.parametrize("dtype", STATES)
def test_the_operation_is_registered_as_it_behaves(dtype: torch.dtype) -> None:
    stored = state_of(dtype, 300, 0)
    args = (stored.codes.clone(), stored.scales, 0)
    torch.library.opcheck(torch.ops.epi_ds.decode, args, test_utils=("test_schema", "test_faketensor"))


def test_values_of_fp32_are_the_storage_itself() -> None:
    """A refresh would otherwise copy all of it several times."""
    codes = torch.rand(10)
    assert decode(Stored(codes, torch.zeros(0), 0)) is codes
