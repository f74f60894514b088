"""Stored importance: encoding, decoding and observing in every format, against fp64 and against themselves."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from epi_ds.kernels import Stored, decode, encode_, num_blocks
from epi_ds.kernels.reference.chunks import CHUNK_NUMEL
from epi_ds.kernels.reference.dither import dither
from tests.support.covering import covering
from tests.support.operations import observe_run

FORMATS = [torch.float32, torch.bfloat16, torch.uint16, torch.uint8]
CODED = FORMATS[1:]
LARGEST = torch.finfo(torch.float32).max
# Around blocks of 256 from several first indices, a prime, around a chunk.
RUNS = [(0, 0), (0, 1), (0, 256), (255, 2), (100, 1009), (256, 257), (5, CHUNK_NUMEL + 3)]


def empty(dtype: torch.dtype, numel: int, first_index: int = 0) -> Stored:
    blocks = num_blocks(first_index, numel) if dtype is torch.uint8 else 0
    return Stored(torch.zeros(numel, dtype=dtype), torch.zeros(blocks), first_index)


def encoded(dtype: torch.dtype, values: Tensor, *, first_index: int = 0, key: int = 1, step: int = 0) -> Stored:
    stored = empty(dtype, values.numel(), first_index)
    encode_(stored, values, key=key, step=step)
    return stored


def gap_above(dtype: torch.dtype, values: Tensor, stored: Stored) -> Tensor:
    """The distance between the two codes around each value, fp64: what rounding may change it by."""
    wide = values.double()
    if dtype is torch.float32:
        return torch.zeros_like(wide)
    if dtype is not torch.uint8:
        fraction_bits = {torch.bfloat16: 7, torch.uint16: 8}[dtype]
        _, exponent = torch.frexp(wide.clamp(min=2.0**-126))
        return torch.ldexp(torch.ones_like(wide), exponent - 1 - fraction_bits)
    before = stored.first_index % 256
    scales = stored.scales.double().repeat_interleave(256)[before : before + values.numel()]
    root = (wide / scales.clamp(min=1e-300)).sqrt() * 255
    # (j + 1)^2 - j^2 at the next whole j above, fp32's own roundings, and what is too small for a block's largest.
    return scales * (2 * root + 3) / 255**2 + wide * 2.0**-20 + 2.0**-110


def hostile(numel: int, seed: int) -> Tensor:
    """Many scales, zeros, denormals, the largest finite value."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=generator).mul(4).exp() * 10.0 ** (-20 + seed % 30)
    values[torch.rand(numel, generator=generator) < 0.1] = 0.0
    if numel > 300:
        values[3] = LARGEST
        values[-7] = 2.0**-149
    return values


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("first_index", "numel"), RUNS)
def test_a_value_is_rounded_to_one_of_the_two_codes_around_it(dtype: torch.dtype, first_index: int, numel: int) -> None:
    values = hostile(numel, seed=numel)
    stored = encoded(dtype, values, first_index=first_index)
    decoded = decode(stored)
    assert decoded.dtype is torch.float32
    assert decoded.isfinite().all()
    assert (decoded[values == 0] == 0).all()
    gap = gap_above(dtype, values, stored)
    below_largest = values < 3e38
    assert ((decoded.double() - values.double()).abs() <= gap)[below_largest].all()
    # What sits on a code stays there, whatever the random numbers; the scale of a block may be rounded anew.
    again = encoded(dtype, decoded, first_index=first_index, step=9)
    assert torch.equal(again.codes.view(torch.uint8), stored.codes.view(torch.uint8))
    assert torch.allclose(decode(again), decoded, rtol=2.0**-21 if dtype is torch.uint8 else 0.0, atol=0.0)


@pytest.mark.parametrize("dtype", CODED)
def test_rounding_is_right_on_average(dtype: torch.dtype) -> None:
    """Over 2000 steps the mean error of an entry is a small part of a code: no bias, whatever the value."""
    values = torch.rand(300, generator=torch.Generator().manual_seed(0)) + 1e-3
    total = torch.zeros(300, dtype=torch.float64)
    for step in range(2000):
        stored = encoded(dtype, values, key=77, step=step)
        total += decode(stored).double()
    error = (total / 2000 - values.double()) / gap_above(dtype, values, stored)
    # Random numbers that advance by the golden ratio miss a share by less than log2(n)/n; independent ones would by
    # 1/sqrt(n), three times this bound.
    assert float(error.abs().max()) < math.log2(2000) / 2000


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_order_of_codes_is_the_order_of_values(dtype: torch.dtype) -> None:
    values = torch.linspace(0, 1, 256)
    decoded = decode(encoded(dtype, values))
    gap = gap_above(dtype, values, encoded(dtype, values))
    assert (decoded.double().diff() >= -gap[1:]).all()
    codes = encoded(dtype, decoded).codes
    codes = codes.view(torch.int16).int() & 0xFFFF if dtype in (torch.uint16, torch.bfloat16) else codes
    assert torch.equal(torch.argsort(codes, stable=True), torch.argsort(decoded, stable=True))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("cut", [0, 1, 156, 157, 412, 999])
def test_a_piece_decodes_as_part_of_the_whole(dtype: torch.dtype, cut: int) -> None:
    stored = encoded(dtype, hostile(1000, seed=3), first_index=100)
    both = [decode(stored.part(0, cut)), decode(stored.part(cut, 1000))]
    assert torch.equal(torch.cat(both), decode(stored))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint16])
def test_codes_do_not_depend_on_where_a_parameter_is_cut(dtype: torch.dtype) -> None:
    values, gradient = hostile(1000, seed=4), torch.randn(1000)
    whole = encoded(dtype, values, first_index=40)
    observe_run(whole, gradient, ema_decay=0.9, key=3, step=5)
    parts = []
    for start, stop in ((0, 1), (1, 700), (700, 1000)):
        part = encoded(dtype, values[start:stop], first_index=40 + start)
        observe_run(part, gradient[start:stop], ema_decay=0.9, key=3, step=5)
        parts.append(decode(part))
    assert torch.equal(torch.cat(parts), decode(whole))


@pytest.mark.parametrize(
    ("dtype", "run", "gradient_dtype"), covering(FORMATS, RUNS, [torch.float32, torch.bfloat16]), ids=str
)
def test_observe_is_the_exponential_average_of_squares(
    dtype: torch.dtype, run: tuple[int, int], gradient_dtype: torch.dtype
) -> None:
    first_index, numel = run
    stored = encoded(dtype, torch.rand(numel), first_index=first_index)
    before = decode(stored).clone()
    gradient = torch.randn(numel).to(gradient_dtype)
    untouched = gradient.clone()
    expected = 0.9 * before.double() + 0.1 * (gradient.double() / 4) ** 2
    observe_run(stored, gradient, ema_decay=0.9, inverse_scale=0.25, key=2, step=3)
    error = (decode(stored).double() - expected).abs()
    # Three roundings of fp32, 6e-8 each, and that to a code.
    assert (error <= 2e-7 * expected + gap_above(dtype, expected.float(), stored) * (1 + 1e-6)).all()
    assert torch.equal(gradient, untouched)


@pytest.mark.parametrize("dtype", FORMATS)
def test_observe_saturates_and_keeps_non_finite_values_out(dtype: torch.dtype) -> None:
    # A block each: under uint8 one huge value leaves no resolution for its neighbours.
    gradients = [1e30, float("nan"), float("inf"), -1e38, 0.0]
    starts = [0.0, 1.0, LARGEST, LARGEST, 1.0]
    results = []
    for gradient, start in zip(gradients, starts, strict=True):
        stored = encoded(dtype, torch.tensor([start]))
        for step in range(3):
            observe_run(stored, torch.tensor([gradient]), ema_decay=0.5, step=step)
        results.append(float(decode(stored)))
    assert all(math.isfinite(value) for value in results)
    # The largest code of bfloat16 is 2^-8 below the largest fp32.
    assert results[2] == results[3] == pytest.approx(LARGEST, rel=2.0**-8)
    assert results[1] == results[4] == 0.125
    assert results[0] == pytest.approx(LARGEST * 0.875, rel=0.02)


@pytest.mark.parametrize("dtype", FORMATS)
def test_observe_without_a_gradient_only_decays(dtype: torch.dtype) -> None:
    stored = encoded(dtype, torch.tensor([2.0, 2.0]))
    observe_run(stored, None, ema_decay=0.5)
    assert decode(stored).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("ema_decay", [0.9, 0.99, 0.995, 0.999])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside-live-entries"])
def test_silenced_entries_are_forgotten_as_in_fp32(
    dtype: torch.dtype, ema_decay: float, alone: bool, record_property: Callable[[str, str], None]
) -> None:
    """After 1000 steps without a gradient the mean is that of fp32: nearest rounding would stall above it."""
    generator = torch.Generator().manual_seed(1)
    numel = 4096
    silenced = torch.ones(numel, dtype=torch.bool) if alone else torch.rand(numel, generator=generator) < 0.5
    start = torch.randn(numel, generator=generator).exp()
    stored, exact = encoded(dtype, start), encoded(torch.float32, start)
    for step in range(1000):
        gradient = torch.randn(numel, generator=generator)
        gradient[silenced] = 0.0
        for each in (stored, exact):
            observe_run(each, gradient, ema_decay=ema_decay, key=6, step=step)
    mean, truth = (float(decode(each).double()[silenced].mean()) for each in (stored, exact))
    # "One code": the smallest value above zero that the silenced entries can have.
    one_code = float(stored.scales.mean()) / 255**2 if dtype is torch.uint8 else 0.0
    assert mean <= 1.2 * truth + one_code
    if dtype is not torch.float32 and ema_decay >= 0.99 and not alone:
        name = str(dtype).removeprefix("torch.")
        line = (
            f"importance 1000 steps after the last gradient, {name}, ema_decay {ema_decay}: {mean / truth:.3f} x fp32"
        )
        record_property("measured", line)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(CODED),
    st.lists(st.floats(0, LARGEST, width=32), min_size=1, max_size=600),
    st.integers(0, 2**40),
    st.integers(0, 2**32 - 1),
    st.integers(0, 10**9),
)
def test_any_values_survive_a_round_trip(
    dtype: torch.dtype, values: list[float], first_index: int, key: int, step: int
) -> None:
    given_values = torch.tensor(values, dtype=torch.float32)
    stored = encoded(dtype, given_values, first_index=first_index, key=key, step=step)
    decoded = decode(stored)
    assert decoded.isfinite().all()
    assert ((decoded == 0) | (given_values > 0)).all()
    if dtype is torch.uint8:
        assert float(decoded.max()) == pytest.approx(float(given_values.max()), rel=1e-6, abs=2.0**-110)


def test_dither_is_uniform_and_differs_by_entry_key_and_step() -> None:
    device = torch.device("cpu")

    def unit(key: int, step: int, first: int = 0) -> Tensor:
        return dither(key, first, 100_000, step=step, device=device).double() / 2**16

    base = unit(1, 0)
    # The Kolmogorov-Smirnov statistic of 1e5 uniform numbers is below 0.0062 with probability 0.999.
    assert float((base.sort().values - torch.arange(100_000) / 100_000).abs().max()) < 0.0062
    assert float(torch.corrcoef(torch.stack([base[1:], base[:-1]]))[0, 1].abs()) < 0.015
    assert float(torch.corrcoef(torch.stack([base, unit(2, 0)]))[0, 1].abs()) < 0.015
    # An entry's own numbers along the steps: no gap of the circle longer than 3/n stays empty.
    own = torch.stack([unit(1, step)[:5] for step in range(1000)]).sort(dim=0).values
    assert float(own.diff(dim=0).max()) < 3 / 1000
    # The index of an entry counts, not where its partition begins, beyond 32 bits as well.
    assert torch.equal(unit(1, 4)[50:60], unit(1, 4, first=50)[:10])
    assert torch.equal(unit(1, 4)[51:60], unit(1, 4, first=51)[:9])
    assert not torch.equal(unit(1, 4), unit(1, 4, first=2**33))
