from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epi_ds.isolation.importance.codes import TOP_CODE, ceil_code, codes_of, decode

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
