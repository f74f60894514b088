"""`masked_sumsq` in C++, against the plain torch implementation and against itself."""

from __future__ import annotations

import pytest
import torch

from epi_ds.kernels.cpu.masked_sumsq import masked_sumsq as compiled
from epi_ds.kernels.reference.masked_sumsq import masked_sumsq as reference
from tests.support.operations import SIZES, bits_of, mask_of, runnable_variants, same_bits


@pytest.mark.parametrize("variant", runnable_variants())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [*SIZES, 4095, 4096, 4097])
def test_sums_are_those_of_the_reference(variant: str, dtype: torch.dtype, numel: int) -> None:
    values = torch.randn(numel + 1, generator=torch.Generator().manual_seed(1)).to(dtype)[1:]
    for first_entry in (0, 1, 13, 64):
        bits = bits_of(mask_of(numel + first_entry))
        expected = reference(values, bits, first_entry=first_entry)
        found = [
            compiled(values, bits, first_entry=first_entry, variant=variant, num_threads=threads)
            for threads in (1, 2, 3, 4)
        ]
        # The same fp64 numbers, summed in another order than torch's.
        torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=0)
        assert all(same_bits(found[0], other) for other in found[1:])


def test_every_instruction_set_sums_in_one_order() -> None:
    values, bits = torch.randn(100_003), bits_of(mask_of(100_003))
    found = [compiled(values, bits, first_entry=0, variant=variant) for variant in runnable_variants()]
    assert all(same_bits(found[0], other) for other in found[1:])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38, 1e-45])
@pytest.mark.parametrize("variant", runnable_variants())
def test_what_is_isolated_never_enters_the_second_sum(value: float, variant: str) -> None:
    values, mask = torch.ones(5000), torch.zeros(5000, dtype=torch.bool)
    values[4099], mask[4099] = value, True
    everything, plastic = compiled(values, bits_of(mask), first_entry=0, variant=variant)
    assert plastic == 4999
    # No finite gradient overflows: what is not finite here is not finite in the gradient.
    assert everything.isfinite() == torch.tensor(value).isfinite()


def test_the_operation_is_registered_as_it_behaves() -> None:
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.epi_ds.masked_sumsq, (torch.randn(300), bits_of(mask_of(300)), 0), test_utils=checks
    )
