"""`hold`, `restore_`, `mask_` and `count_bits` in C++: the bits of the plain torch implementations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from epi_ds.kernels.cpu import hold as compiled
from epi_ds.kernels.reference import hold as reference
from tests.support.covering import covering
from tests.support.operations import SIZES, bits_of, mask_of, runnable_variants, same_bits


def hostile(numel: int, dtype: torch.dtype) -> Tensor:
    """Values in memory that begins one entry behind an aligned address; NaN and -0 are part of the bits."""
    values = torch.randn(numel + 1, generator=torch.Generator().manual_seed(1)).to(dtype)[1:]
    if numel > 2:
        values[0], values[1], values[2] = torch.nan, -0.0, torch.inf
    return values


# Every instruction set has code of its own for every width; a fault may show at one size or share only.
@pytest.mark.parametrize(
    ("variant", "dtype", "numel", "share"),
    covering(
        runnable_variants(),
        [torch.float32, torch.bfloat16, torch.float64],
        [*SIZES, 4095, 4096, 4097],
        [0.0, 0.01, 0.5, 1.0],
        strength=3,
    ),
)
def test_bits_are_those_of_the_reference(variant: str, dtype: torch.dtype, numel: int, share: float) -> None:
    bits, values = bits_of(mask_of(numel, share)), hostile(numel, dtype)
    count = reference.count_bits(bits)
    held = reference.hold(values, bits, count)
    for num_threads in (1, 2, 3, 4):
        settings = {"variant": variant, "num_threads": num_threads}
        assert compiled.count_bits(bits, **settings) == count
        assert same_bits(compiled.hold(values, bits, count, **settings), held)
        moved = hostile(numel, dtype).add_(1.0)
        expected = moved.clone()
        reference.restore_(expected, bits, held)
        compiled.restore_(moved, bits, held, **settings)
        assert same_bits(expected, moved)
        reference.mask_(expected, bits)
        compiled.mask_(moved, bits, **settings)
        assert same_bits(expected, moved)


def test_a_count_that_is_not_that_of_the_mask_is_refused() -> None:
    """One too few would be written behind the memory of the held entries."""
    values, bits = torch.randn(5000), bits_of(mask_of(5000))
    count = reference.count_bits(bits)
    for wrong in (count - 1, count + 1):
        with pytest.raises(ValueError, match=f"{count} entries are isolated, but there is room for {wrong}"):
            compiled.hold(values, bits, wrong)
        with pytest.raises(ValueError, match="pass their number"):
            compiled.restore_(values, bits, torch.zeros(wrong))
        with pytest.raises(ValueError, match=f"{count} entries are isolated, and not {wrong}"):
            reference.hold(values, bits, wrong)
    with pytest.raises(ValueError, match=r"held has .* entries of torch\.uint8"):
        compiled.restore_(values, bits, torch.zeros(count, dtype=torch.uint8))
    with pytest.raises(ValueError, match="625 bytes"):
        compiled.mask_(values, bits[:-1])


def test_the_operations_are_registered_as_they_behave() -> None:
    checks = ("test_schema", "test_faketensor")
    values, bits = torch.randn(300), bits_of(mask_of(300))
    count = reference.count_bits(bits)
    for operation, args in (
        (torch.ops.epi_ds.hold, (values, bits, count)),
        (torch.ops.epi_ds.restore_, (values.clone(), bits, torch.randn(count))),
        (torch.ops.epi_ds.mask_, (values.clone(), bits)),
        (torch.ops.epi_ds.count_bits, (bits,)),
    ):
        torch.library.opcheck(operation, args, test_utils=checks)
