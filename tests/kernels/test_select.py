"""`select_` in C++: the bits of the plain torch implementation."""

from __future__ import annotations

import pytest
import torch

from epi_ds.kernels.cpu.select import select_ as compiled
from epi_ds.kernels.reference.select import select_ as reference
from tests.support.covering import covering
from tests.support.operations import SIZES, bits_of, mask_of, runnable_variants, same_bits, values_of


@pytest.mark.parametrize(
    ("variant", "numel", "num_threads"), covering(runnable_variants(), [*SIZES, 4095, 4096, 4097], [1, 2, 3, 4])
)
def test_bits_are_those_of_the_reference(variant: str, numel: int, num_threads: int) -> None:
    codes = values_of(numel + 1).view(torch.int32)[1:]
    for first_entry in (0, 1, 13, 64, 4090):
        # Entries in front and behind belong to others, which keep theirs.
        whole = first_entry + numel + 21
        before = bits_of(mask_of(whole))
        for threshold_code in (1, 0x3F800000, 0x7F800000):
            expected, found = bits_of(mask_of(whole, 0.5)), bits_of(mask_of(whole, 0.5))
            settings = {"threshold_code": threshold_code, "first_entry": first_entry}
            counts = reference(expected, codes, before, **settings)
            same = compiled(found, codes, before, variant=variant, num_threads=num_threads, **settings)
            assert torch.equal(counts, same)
            assert same_bits(expected, found)


def test_the_operation_is_registered_as_it_behaves() -> None:
    checks = ("test_schema", "test_faketensor")
    codes = values_of(300).view(torch.int32)
    args = (bits_of(mask_of(300)), codes, bits_of(mask_of(300)), 5, 0)
    torch.library.opcheck(torch.ops.epi_ds.select_, args, test_utils=checks)
