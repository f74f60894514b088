"""The Triton kernels on a GPU: the bits of the plain torch implementation. Under Triton's interpreter, on the CPU.

The reference runs on the CPU in both cases, so a GPU is compared with what every other machine computes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from epi_ds.kernels.reference.code_histogram import NUM_CODES
from epi_ds.kernels.reference.codecs import Stored
from epi_ds.kernels.reference.decode import decode as reference_decode
from epi_ds.kernels.reference.encode import encode_ as reference_encode
from epi_ds.kernels.reference.hold import hold as reference_hold
from epi_ds.kernels.reference.masked_sumsq import masked_sumsq as reference_masked_sumsq
from epi_ds.kernels.reference.observe import observe_ as reference_observe
from epi_ds.kernels.reference.pull import pull_ as reference_pull
from epi_ds.kernels.reference.pull_by_code import pull_by_code_ as reference_pull_by_code
from epi_ds.kernels.reference.runs import NUM_COLUMNS, Run, table_of
from epi_ds.kernels.reference.select import select_ as reference_select
from epi_ds.kernels.reference.sketch_counts import sketch_counts as reference_sketch_counts
from tests.support.gpu_operations import (
    DEVICE,
    FIRST_INDICES,
    INTERPRETED,
    SIZES,
    moved,
    partition_of,
    same_but_for_nan,
    special_gradient,
    special_values,
)
from tests.support.operations import STATES, bits_of, mask_of, same_bits, stored_of, values_around_codes, values_of

pytest.importorskip("triton", reason="Triton, which the GPU kernels are written in, is not installed")
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip(
        "no GPU is visible (set DS_ACCELERATOR=cuda where there is one); test_gpu_interpreted.py runs this file too",
        allow_module_level=True,
    )
pytestmark = pytest.mark.gpu

from epi_ds.kernels.gpu.decode import decode  # noqa: E402
from epi_ds.kernels.gpu.encode import encode_  # noqa: E402
from epi_ds.kernels.gpu.hold import count_bits, hold, mask_, restore_  # noqa: E402
from epi_ds.kernels.gpu.masked_sumsq import masked_sumsq  # noqa: E402
from epi_ds.kernels.gpu.observe import observe_  # noqa: E402
from epi_ds.kernels.gpu.pull import pull_  # noqa: E402
from epi_ds.kernels.gpu.pull_by_code import pull_by_code_  # noqa: E402
from epi_ds.kernels.gpu.select import select_  # noqa: E402
from epi_ds.kernels.gpu.sketch_counts import sketch_counts  # noqa: E402

TOP = 0x7F800000


# --- observe_ ---


@pytest.mark.parametrize("dtype", STATES)
@pytest.mark.parametrize(
    ("gradient_dtype", "rescale"),
    [
        # The longest when interpreted.
        pytest.param(torch.float32, 1.0, marks=pytest.mark.slow),
        (torch.float32, 0.3),
        pytest.param(torch.bfloat16, 1.0, marks=pytest.mark.slow),
        pytest.param(torch.float16, 1.0, marks=pytest.mark.slow),
        (None, 1.0),
    ],
)
def test_observe(dtype: torch.dtype, gradient_dtype: torch.dtype | None, rescale: float) -> None:
    expected = partition_of(dtype)
    found = expected.clone(DEVICE)
    gradients = [None if gradient_dtype is None else each.gradient.to(gradient_dtype) for each in (expected, found)]
    for step in range(2):
        settings = {"ema_decay": 0.9, "inverse_scale": 0.25, "rescale": rescale, "step": step}
        reference_observe(expected.codes, expected.scales, gradients[0], expected.table, **settings)  # type: ignore[arg-type]
        observe_(found.codes, found.scales, gradients[1], found.table, **settings)  # type: ignore[arg-type]
    found = found.clone(torch.device("cpu"))
    for run in expected.runs:
        if run.first_code >= 0:
            # Together with the entry behind it, which no run has.
            own = slice(run.first_code, run.first_code + run.numel + 1)
            assert same_bits(expected.codes[own].clone(), found.codes[own].clone()), run
    assert same_bits(expected.scales, found.scales)
    if gradients[0] is not None and gradients[1] is not None:
        assert same_but_for_nan(gradients[0].float(), gradients[1].cpu().float())


def test_observe_without_a_gradient_walks_more_tiles_than_there_are_codes_for() -> None:
    """The grid is sized by the codes then, but the table numbers the tiles of other entries too."""
    values = special_values(1009)
    expected, found = stored_of(torch.uint16, values, 0), moved(stored_of(torch.uint16, values, 0))
    runs = [Run(0, 20 * 4096, -1, 0, 0, 0), Run(20 * 4096, 1009, 0, 0, 0, 5)]
    for stored, observe in ((expected, reference_observe), (found, observe_)):
        table = table_of(runs, device=stored.codes.device)
        observe(stored.codes, stored.scales, None, table, ema_decay=0.9)
    assert same_bits(expected.codes.clone(), found.codes.cpu().clone())


@pytest.mark.parametrize("dtype", STATES)
def test_observe_of_nothing(dtype: torch.dtype) -> None:
    codes, scales = torch.zeros(0, dtype=dtype, device=DEVICE), torch.zeros(0, device=DEVICE)
    table = torch.zeros((0, NUM_COLUMNS), dtype=torch.int64, device=DEVICE)
    for gradient in (None, torch.zeros(0, device=DEVICE), torch.full((5,), 3.0, device=DEVICE)):
        observe_(codes, scales, gradient, table, ema_decay=0.9, rescale=0.5)
    # No run covers these.
    assert torch.equal(gradient, torch.full((5,), 3.0, device=DEVICE))  # type: ignore[arg-type]


def test_observe_refuses_to_unscale_a_gradient_that_would_lose_bits() -> None:
    stored, gradient = moved(stored_of(torch.uint8, special_values(9), 0)), torch.ones(9, device=DEVICE).bfloat16()
    table = table_of([Run(0, 9, 0, 0, 0, 0)], device=DEVICE)
    with pytest.raises(ValueError, match=r"bfloat16"):
        observe_(stored.codes, stored.scales, gradient, table, ema_decay=0.9, rescale=0.5)


def test_tensors_that_are_not_in_one_piece_are_refused() -> None:
    with pytest.raises(ValueError, match=r"stride \(2,\)"):
        decode(Stored(torch.zeros(10, dtype=torch.bfloat16, device=DEVICE)[::2], torch.zeros(0, device=DEVICE), 0))


# --- decode, encode_ ---


@pytest.mark.parametrize("dtype", STATES)
@pytest.mark.parametrize("numel", SIZES)
def test_decode(dtype: torch.dtype, numel: int) -> None:
    for first_index in FIRST_INDICES:
        stored = stored_of(dtype, special_values(numel), first_index)
        assert same_bits(decode(moved(stored)).cpu(), reference_decode(stored))


def test_values_of_fp32_are_the_storage_itself() -> None:
    codes = torch.rand(10, device=DEVICE)
    assert decode(Stored(codes, torch.zeros(0), 0)) is codes


@pytest.mark.parametrize("dtype", STATES)
@pytest.mark.parametrize("numel", SIZES)
def test_encode(dtype: torch.dtype, numel: int) -> None:
    values = special_values(numel)
    for first_index in FIRST_INDICES:
        for key, step in ((5, 0), (0xF0000001, 1000)):
            expected = stored_of(dtype, torch.zeros(numel), first_index)
            found = moved(expected)
            reference_encode(expected, values, key=key, step=step)
            encode_(found, values.to(DEVICE), key=key, step=step)
            assert same_bits(found.codes.cpu(), expected.codes.clone())
            assert same_bits(found.scales.cpu(), expected.scales)


def test_encode_rounds_values_around_codes_as_the_reference() -> None:
    values = values_around_codes(repeats=700)
    expected = stored_of(torch.uint8, torch.zeros(len(values)), 0)
    found = moved(expected)
    reference_encode(expected, values, key=5, step=3)
    encode_(found, values.to(DEVICE), key=5, step=3)
    assert same_bits(found.codes.cpu(), expected.codes.clone())


# --- sketch_counts ---


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


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("grid", range(5))
def test_sketch_counts(numel: int, grid: int) -> None:
    codes, edges = values_of(numel).view(torch.int32), grids()[grid]
    found = sketch_counts(codes.to(DEVICE), edges.to(DEVICE))
    assert torch.equal(found.cpu(), reference_sketch_counts(codes, edges))


# --- masked_sumsq ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("numel", SIZES)
def test_masked_sumsq(dtype: torch.dtype, numel: int) -> None:
    values = torch.randn(numel).to(dtype)
    for first_entry in (0, 1, 77):
        mask = mask_of(first_entry + numel, 0.2)
        bits = bits_of(mask)
        found = masked_sumsq(values.to(DEVICE), bits.to(DEVICE), first_entry=first_entry).cpu()
        expected = reference_masked_sumsq(values, bits, first_entry=first_entry)
        # The same fp64 numbers in another order: sums of positive ones, each rounded less than 5000 times.
        torch.testing.assert_close(found, expected, rtol=5000 * 2.0**-53, atol=0.0)


def test_masked_sumsq_leaves_isolated_entries_out_whatever_they_are() -> None:
    values, mask = torch.ones(5000), torch.zeros(5003, dtype=torch.bool)
    mask[3 + 4500 : 3 + 4503] = True
    for special in (torch.nan, torch.inf, -torch.inf):
        values[4501] = special
        sums = masked_sumsq(values.to(DEVICE), bits_of(mask).to(DEVICE), first_entry=3)
        assert not sums[0].isfinite()
        assert sums[1] == 5000 - 3


# --- select_ ---


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("first_entry", [0, 1, 7, 77, 4096])
def test_select(numel: int, first_entry: int) -> None:
    codes = values_of(numel).view(torch.int32)
    # Neighbours on both sides have bits, which must stay.
    expected, before = (bits_of(mask_of(first_entry + numel + extra, 0.5)) for extra in (13, 14))
    for threshold_code in (0, 0x3F800000, TOP):
        found = expected.to(DEVICE, copy=True)
        counts = select_(
            found, codes.to(DEVICE), before.to(DEVICE), threshold_code=threshold_code, first_entry=first_entry
        )
        expected_counts = reference_select(
            expected, codes, before, threshold_code=threshold_code, first_entry=first_entry
        )
        assert torch.equal(found.cpu(), expected)
        assert counts.dtype is torch.int64
        assert torch.equal(counts.cpu(), expected_counts)


# --- hold, restore_, mask_, count_bits ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_hold_and_restore(dtype: torch.dtype, numel: int, share: float) -> None:
    # One entry behind an aligned address. NaN and the sign of zero are part of the bits.
    values = special_gradient(numel + 1).to(dtype).to(DEVICE)[1:]
    mask = mask_of(numel, share)
    bits = bits_of(mask)
    before = values.cpu().clone()
    held = hold(values, bits.to(DEVICE), int(mask.sum()))
    assert count_bits(bits.to(DEVICE)) == held.numel()
    assert same_bits(held.cpu(), reference_hold(before, bits, int(mask.sum())))
    assert same_bits(values.cpu().clone(), before)

    values.copy_(torch.randn(numel) * float("inf"))
    expected = values.cpu().clone()
    expected[mask] = before[mask]
    restore_(values, bits.to(DEVICE), held)
    assert same_bits(values.cpu().clone(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", SIZES)
def test_mask(dtype: torch.dtype, numel: int) -> None:
    mask = mask_of(numel, 0.2)
    values = torch.full((numel,), float("nan"), dtype=dtype, device=DEVICE)
    values[(~mask).to(DEVICE)] = -2.0
    mask_(values, bits_of(mask).to(DEVICE))
    assert same_bits(values.cpu(), torch.where(mask, 0.0, -2.0).to(dtype))


# --- pull_, pull_by_code_ ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", SIZES)
def test_pull(dtype: torch.dtype, numel: int) -> None:
    # One entry behind an aligned address.
    weights = special_gradient(numel + 1)[1:]
    anchor, factors = torch.randn(numel + 1).to(dtype)[1:], torch.rand(numel + 1)[1:]
    for factor in (-0.3, factors):
        expected, found = weights.clone(), weights.to(DEVICE, copy=True)
        on_device = factor.to(DEVICE) if isinstance(factor, Tensor) else factor
        reference_pull(expected, expected, anchor, factor)
        pull_(found, found, anchor.to(DEVICE), on_device)
        assert same_but_for_nan(found.cpu(), expected)
        gradient = torch.randn(numel)
        moved_gradient, elsewhere = gradient.to(DEVICE, copy=True), torch.empty(numel, device=DEVICE)
        pull_(elsewhere, weights.to(DEVICE), anchor.to(DEVICE), on_device, source=moved_gradient)
        pull_(moved_gradient, weights.to(DEVICE), anchor.to(DEVICE), on_device)
        reference_pull(gradient, weights, anchor, factor)
        assert same_but_for_nan(moved_gradient.cpu(), gradient)
        assert same_but_for_nan(elsewhere.cpu(), gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("num_tables", [1, 3])
def test_pull_by_code(dtype: torch.dtype, numel: int, num_tables: int) -> None:
    # One entry behind an aligned address.
    weights, anchor = special_gradient(numel + 1)[1:], torch.randn(numel + 1).to(dtype)[1:]
    numbers = torch.randint(0, NUM_CODES, (num_tables, numel + 1))
    numbers[:, 1:3] = torch.tensor([0, NUM_CODES - 1])[:numel]
    factors = -torch.rand((num_tables, NUM_CODES))
    factors[:, 0] = -0.0
    patterns = numbers.int().to(torch.int16)
    for codes_dtype in (torch.bfloat16, torch.uint16):
        # Not every operation knows uint16.
        codes = [row.view(codes_dtype)[1:] for row in patterns]
        on_device = [row.to(DEVICE, copy=True).view(codes_dtype)[1:] for row in patterns]
        expected, found = weights.clone(), weights.to(DEVICE, copy=True)
        reference_pull_by_code(expected, expected, anchor, codes, factors)
        pull_by_code_(found, found, anchor.to(DEVICE), on_device, factors.to(DEVICE))
        assert same_but_for_nan(found.cpu(), expected)
        gradient = torch.randn(numel)
        pulled_gradient, elsewhere = gradient.to(DEVICE, copy=True), torch.empty(numel, device=DEVICE)
        operands = (weights.to(DEVICE), anchor.to(DEVICE), on_device, -factors.to(DEVICE))
        pull_by_code_(elsewhere, *operands, source=pulled_gradient)
        pull_by_code_(pulled_gradient, *operands)
        reference_pull_by_code(gradient, weights, anchor, codes, -factors)
        assert same_but_for_nan(pulled_gradient.cpu(), gradient)
        assert same_but_for_nan(elsewhere.cpu(), gradient)
