"""`pull_` in C++: the bits of the plain torch implementation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from epi_ds.kernels.cpu import pull as compiled
from epi_ds.kernels.reference import pull as reference
from tests.support.covering import covering
from tests.support.gpu_operations import same_but_for_nan, special_gradient
from tests.support.operations import SIZES, runnable_variants, same_bits


def operands(numel: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, their anchor and a factor of each, in memory that begins one entry behind an aligned address."""
    generator = torch.Generator().manual_seed(numel)
    anchor = torch.randn(numel + 1, generator=generator).to(dtype)[1:]
    return special_gradient(numel + 1)[1:], anchor, torch.rand(numel + 1, generator=generator)[1:]


@pytest.mark.parametrize(
    ("variant", "dtype", "numel", "each"),
    covering(runnable_variants(), [torch.float32, torch.bfloat16], [*SIZES, 4097], [True, False], strength=3),
)
def test_bits_are_those_of_the_reference(variant: str, dtype: torch.dtype, numel: int, each: bool) -> None:
    weights, anchor, factors = operands(numel, dtype)
    factor = factors if each else -0.3
    gradient = torch.randn(numel, generator=torch.Generator().manual_seed(1))
    expected_weights, expected_gradient = weights.clone(), gradient.clone()
    reference.pull_(expected_weights, expected_weights, anchor, factor)
    reference.pull_(expected_gradient, weights, anchor, factor)
    for num_threads in (1, 2, 3, 4):
        pulled_weights, pulled_gradient = weights.clone(), gradient.clone()
        settings = {"variant": variant, "num_threads": num_threads}
        compiled.pull_(pulled_weights, pulled_weights, anchor, factor, **settings)
        compiled.pull_(pulled_gradient, weights, anchor, factor, **settings)
        # Processors differ in which NaN they make of two.
        assert same_but_for_nan(pulled_weights, expected_weights)
        assert same_but_for_nan(pulled_gradient, expected_gradient)
        elsewhere = torch.full_like(gradient, float("nan"))
        compiled.pull_(elsewhere, weights, anchor, factor, source=gradient, **settings)
        assert same_but_for_nan(elsewhere, expected_gradient)
    elsewhere = torch.full_like(gradient, float("nan"))
    reference.pull_(elsewhere, weights, anchor, factor, source=gradient)
    assert same_but_for_nan(elsewhere, expected_gradient)


def test_an_anchor_in_bf16_pulls_as_its_values_in_fp32_do() -> None:
    weights, anchor, factors = operands(1009, torch.bfloat16)
    for factor in (-0.3, factors):
        one, other = weights.nan_to_num(), weights.nan_to_num()
        reference.pull_(one, one, anchor, factor)
        reference.pull_(other, other, anchor.float(), factor)
        assert same_bits(one, other)


def test_a_share_of_all_goes_the_whole_way() -> None:
    weights, anchor = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.25, -1.0, 0.5])
    reference.pull_(weights, weights, anchor, -1.0)
    assert torch.equal(weights, anchor)


def test_entries_that_are_not_there_are_refused() -> None:
    weights = torch.zeros(5)
    with pytest.raises(ValueError, match="an anchor has 4 entries"):
        compiled.pull_(weights, weights, torch.zeros(4), 0.1)
    with pytest.raises(ValueError, match=r"an anchor has 5 entries of torch\.float16"):
        compiled.pull_(weights, weights, torch.zeros(5).half(), 0.1)
    with pytest.raises(ValueError, match="factor has 4 entries"):
        compiled.pull_(weights, weights, torch.zeros(5), torch.zeros(4))
    with pytest.raises(ValueError, match="weights has 6 entries"):
        compiled.pull_(weights, torch.zeros(6), torch.zeros(5), 0.1)
    with pytest.raises(ValueError, match="source has 4 entries"):
        compiled.pull_(weights, weights, torch.zeros(5), 0.1, source=torch.zeros(4))


def test_the_operation_is_registered_as_it_behaves() -> None:
    checks = ("test_schema", "test_faketensor")
    for factors in (None, torch.rand(300)):
        args = (torch.randn(300), torch.randn(300), torch.randn(300).bfloat16(), factors, 0.5)
        torch.library.opcheck(torch.ops.epi_ds.pull_, args, test_utils=checks)
        torch.library.opcheck(torch.ops.epi_ds.pull_, (*args, torch.randn(300)), test_utils=checks)
