"""`sketch_counts` in C++: the integers of the plain torch implementation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from epi_ds.kernels.cpu.sketch_counts import sketch_counts as compiled
from epi_ds.kernels.reference.sketch_counts import sketch_counts as reference
from tests.support.covering import covering
from tests.support.operations import SIZES, runnable_variants, values_of

TOP = 0x7F800000


def grids() -> list[Tensor]:
    """One edge, all bits in equal steps, crowded edges with ties, edges that nothing or everything reaches."""
    crowded = (torch.arange(2048) // 3 + 0x3F800000).int()
    return [
        torch.tensor([0x3F800000], dtype=torch.int32),
        (torch.arange(1, 257, dtype=torch.int64) * (TOP // 256)).int(),
        torch.cat([torch.tensor([1, 1]).int(), crowded, torch.tensor([TOP, TOP]).int()]),
        torch.tensor([TOP, TOP], dtype=torch.int32),
        torch.tensor([0, 0, 1], dtype=torch.int32),
    ]


@pytest.mark.parametrize(("variant", "numel", "grid"), covering(runnable_variants(), SIZES, range(5)))
def test_counts_are_those_of_the_reference(variant: str, numel: int, grid: int) -> None:
    codes, edges = values_of(numel + 1)[1:].view(torch.int32), grids()[grid]
    expected = reference(codes, edges)
    brute = [(codes >= edge).sum() for edge in edges.tolist()[:: max(1, len(edges) // 50)]]
    assert expected[:: max(1, len(edges) // 50)].tolist() == [int(count) for count in brute]
    for num_threads in (1, 2, 4):
        assert torch.equal(compiled(codes, edges, variant=variant, num_threads=num_threads), expected)


def test_the_operation_is_registered_as_it_behaves() -> None:
    args = (values_of(300).view(torch.int32), grids()[1])
    torch.library.opcheck(torch.ops.epi_ds.sketch_counts, args, test_utils=("test_schema", "test_faketensor"))
