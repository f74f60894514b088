from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epi_ds.choices import StateFormat
from epi_ds.isolation.importance.codes import TOP_CODE, ceil_code, codes_of, decode
from epi_ds.isolation.importance.mean import Divided, mean_of, significand_sums
from epi_ds.isolation.importance.stored import StoredImportance
from epi_ds.isolation.layout import Parameter, build_layout
from epi_ds.isolation.placement import Placement
from epi_ds.kernels import Stored

CPU = torch.device("cpu")
CODES = st.integers(min_value=0, max_value=TOP_CODE - 1)


def _native_value(code: int) -> float:
    return float(np.array(code, dtype=np.int32).view(np.float32).astype(np.float64))


@given(CODES)
def test_decode_equals_the_native_cast(code: int) -> None:
    assert decode(torch.tensor([code])).item() == _native_value(code)


@given(CODES)
def test_ceil_code_of_a_representable_value_is_its_own_code(code: int) -> None:
    assert ceil_code(decode(torch.tensor([code]))).item() == code


@given(st.floats(min_value=2.0**-290, max_value=2.0**300))
@settings(max_examples=500)
def test_ceil_code_is_the_smallest_code_at_or_above(value: float) -> None:
    code = int(ceil_code(torch.tensor([value], dtype=torch.float64)))
    assert 0 < code <= TOP_CODE
    if code < TOP_CODE:
        assert decode(torch.tensor([code])).item() >= value
    assert decode(torch.tensor([code - 1])).item() < value


def test_order_of_codes_is_order_of_values() -> None:
    values = torch.rand(1000).pow(20)
    assert torch.equal(torch.argsort(values, stable=True), torch.argsort(codes_of(values), stable=True))


@pytest.mark.parametrize("flush", [False, True])
def test_denormals_survive_flush_to_zero(flush: bool) -> None:
    codes = torch.randint(1, 1 << 23, (1000,))
    expected = [_native_value(int(code)) for code in codes]
    if not torch.set_flush_denormal(flush) and flush:
        pytest.skip("this CPU cannot flush denormals")
    try:
        decoded = decode(codes)
        assert decoded.tolist() == expected
        assert torch.equal(ceil_code(decoded), codes)
    finally:
        torch.set_flush_denormal(False)


def stored(values: torch.Tensor, *, rank: int, world_size: int) -> tuple[StoredImportance, Placement]:
    layout = build_layout([[Parameter("0.w", tuple(values.shape))]], rank=rank, world_size=world_size, layer="tensor")
    placement = Placement(layout, (CPU,))
    state = StoredImportance(placement, StateFormat.FP32, seed=0, purpose="importance")
    for segment in layout.segments:
        first = segment.global_start
        state.load(segment, Stored(values[first : first + segment.real_numel], torch.zeros(0), first), step=0)
    return state, placement


@given(st.lists(CODES, min_size=1, max_size=40), st.integers(1, 5))
def test_a_mean_is_exact_and_the_same_however_entries_are_dealt(codes: list[int], world_size: int) -> None:
    values = torch.tensor(codes, dtype=torch.int32).view(torch.float32)
    sums = torch.zeros(256, dtype=torch.int64)
    for rank in range(world_size):
        state, placement = stored(values, rank=rank, world_size=world_size)
        sums += significand_sums(state, placement.layout)
    exact = sum((Fraction(_native_value(code)) for code in codes), Fraction(0)) / len(codes)
    assert mean_of(sums, len(codes)) == float(exact)


def test_importance_is_divided_by_a_mean_of_any_size() -> None:
    values = torch.tensor([0.0, 2.0**-140, 3.0, 2.0**120])
    state, placement = stored(values, rank=0, world_size=1)
    (segment,) = placement.layout.segments
    for mean in (2.0**-130, 1.0, 2.0**100):
        expected = [min(float(value) / mean, torch.finfo(torch.float32).max) for value in values]
        assert Divided(state, mean).read(segment, 0, 4).tolist() == pytest.approx(expected, rel=1e-6, abs=2.0**-149)
    assert not Divided(state, 0.0).read(segment, 0, 4).any()
