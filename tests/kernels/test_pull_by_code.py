"""`pull_by_code_` in C++: the bits of the plain torch implementation, and those of `pull_` with the same factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from epi_ds.kernels.cpu import pull_by_code as compiled
from epi_ds.kernels.reference import pull_by_code as reference
from epi_ds.kernels.reference.code_histogram import NUM_CODES
from epi_ds.kernels.reference.pull import pull_
from tests.support.covering import covering
from tests.support.gpu_operations import same_but_for_nan, special_gradient
from tests.support.operations import SIZES, runnable_variants, same_bits


def operands(numel: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights and their anchor, in memory that begins one entry behind an aligned address."""
    generator = torch.Generator().manual_seed(numel)
    return special_gradient(numel + 1)[1:], torch.randn(numel + 1, generator=generator).to(dtype)[1:]


def codes_of(numel: int, dtype: torch.dtype, num_tables: int) -> list[Tensor]:
    """All codes there are, the first and the last among them, in memory that begins behind an aligned address."""
    generator = torch.Generator().manual_seed(numel)
    found = torch.randint(0, NUM_CODES, (num_tables, numel + 1), generator=generator)
    found[:, 1:3] = torch.tensor([0, NUM_CODES - 1])[: max(numel, 0)]
    return [row[1:] for row in found.to(torch.int32).to(torch.int16).view(dtype)]


def factors_of(num_tables: int) -> Tensor:
    """As a pull of weights has them: none above zero, and a zero of the same sign."""
    generator = torch.Generator().manual_seed(num_tables)
    factors = -torch.rand((num_tables, NUM_CODES), generator=generator).pow(5)
    factors[:, 0] = -0.0
    return factors


@pytest.mark.parametrize(
    ("variant", "dtype", "num_tables", "numel"),
    covering(runnable_variants(), [torch.float32, torch.bfloat16], [1, 3], [*SIZES, 4097], strength=3),
)
def test_bits_are_those_of_the_reference(variant: str, dtype: torch.dtype, num_tables: int, numel: int) -> None:
    weights, towards = operands(numel, dtype)
    # To C++ both formats of codes are numbers of 16 bits.
    by_code, factors = codes_of(numel, torch.uint16, num_tables), factors_of(num_tables)
    gradient = torch.randn(numel, generator=torch.Generator().manual_seed(1))
    expected_weights, expected_gradient = weights.clone(), gradient.clone()
    reference.pull_by_code_(expected_weights, expected_weights, towards, by_code, factors)
    reference.pull_by_code_(expected_gradient, weights, towards, by_code, -factors)
    for num_threads in (1, 2, 3, 4):
        pulled_weights, pulled_gradient = weights.clone(), gradient.clone()
        settings = {"variant": variant, "num_threads": num_threads}
        compiled.pull_by_code_(pulled_weights, pulled_weights, towards, by_code, factors, **settings)
        compiled.pull_by_code_(pulled_gradient, weights, towards, by_code, -factors, **settings)
        elsewhere = torch.full_like(gradient, float("nan"))
        compiled.pull_by_code_(elsewhere, weights, towards, by_code, -factors, source=gradient, **settings)
        assert same_but_for_nan(elsewhere, expected_gradient)
        # Processors differ in which NaN they make of two.
        assert same_but_for_nan(pulled_weights, expected_weights)
        assert same_but_for_nan(pulled_gradient, expected_gradient)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.bfloat16])
@pytest.mark.parametrize("num_tables", [1, 3])
def test_it_is_a_pull_by_the_strongest_factor(dtype: torch.dtype, num_tables: int) -> None:
    weights, anchor = operands(1009, torch.bfloat16)
    codes, factors = codes_of(1009, dtype, num_tables), factors_of(num_tables)
    numbers = [own.view(torch.int16).tolist() for own in codes]
    of_each = [
        min((factors[table, numbers[table][entry] % NUM_CODES] for table in range(num_tables)), key=float)
        for entry in range(1009)
    ]
    expected, found = weights.clone(), weights.clone()
    pull_(expected, expected, anchor, torch.stack(of_each))
    reference.pull_by_code_(found, found, anchor, codes, factors)
    assert same_bits(found, expected)


def test_entries_that_are_not_there_are_refused() -> None:
    weights, factors = torch.zeros(5), torch.zeros((1, NUM_CODES))
    codes = torch.zeros(5, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="an anchor has 4 entries"):
        compiled.pull_by_code_(weights, weights, torch.zeros(4), [codes], factors)
    with pytest.raises(ValueError, match="weights has 6 entries"):
        compiled.pull_by_code_(weights, torch.zeros(6), torch.zeros(5), [codes], factors)
    with pytest.raises(ValueError, match=r"codes are 4 of torch\.bfloat16; pass 5"):
        compiled.pull_by_code_(weights, weights, torch.zeros(5), [codes, codes[1:]], factors)
    with pytest.raises(ValueError, match=r"codes are 5 of torch\.float16"):
        compiled.pull_by_code_(weights, weights, torch.zeros(5), [codes.half()], factors)
    for few in (factors[:, 1:], factors[0], factors.double(), torch.zeros((2, NUM_CODES))):
        with pytest.raises(ValueError, match=r"pass \[1, 65536\] of torch\.float32"):
            compiled.pull_by_code_(weights, weights, torch.zeros(5), [codes], few)
    with pytest.raises(ValueError, match="at least one"):
        compiled.pull_by_code_(weights, weights, torch.zeros(5), [], torch.zeros((0, NUM_CODES)))


def test_the_operation_is_registered_as_it_behaves() -> None:
    checks = ("test_schema", "test_faketensor")
    for num_tables in (1, 2):
        codes = [own.clone() for own in codes_of(300, torch.bfloat16, num_tables)]
        # A pattern that is no number cannot be told from a changed one.
        codes = [own.nan_to_num() for own in codes]
        args = (torch.randn(300), torch.randn(300), torch.randn(300).bfloat16(), codes, factors_of(num_tables))
        torch.library.opcheck(torch.ops.epi_ds.pull_by_code_, args, test_utils=checks)
        torch.library.opcheck(torch.ops.epi_ds.pull_by_code_, (*args, torch.randn(300)), test_utils=checks)
