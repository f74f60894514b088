"""The public sketch against sorting, against another library's sketches, and against its own promises."""

from __future__ import annotations

import math
import struct
import zlib
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from epi_ds import QuantileSketch
from epi_ds.choices import Normalizer, Selection
from epi_ds.errors import UserError
from epi_ds.isolation.importance.codes import TOP_CODE, codes_of
from epi_ds.isolation.layout import Parameter, build_layout
from epi_ds.isolation.search.sketch import PartitionSketch, SegmentCodes
from epi_ds.isolation.search.threshold import find_thresholds
from tests.support.worlds import CountingExchange

# The quantiles of isolating 0.1, 0.5, 1, 5, 10, 20 and 50 %.
QUANTILES = ["0.999", "0.995", "0.99", "0.95", "0.9", "0.8", "0.5"]
SIZE = 1_000_003

finite = st.floats(0, 3.4028234663852886e38, width=32).map(abs)
numbers = st.lists(finite, max_size=60)


def array_of(kind: str, size: int = SIZE, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "log-normal":
        values = np.exp(rng.normal(0, 3, size))
    elif kind == "narrow":
        # All within one bin of the default grid.
        values = 1.0 + rng.integers(0, 1000, size) * 2.0**-23
    elif kind == "constant":
        values = np.full(size, 3.7)
    elif kind == "mostly zero":
        values = np.where(rng.random(size) < 0.97, 0.0, rng.random(size))
    elif kind == "denormal":
        values = rng.integers(0, 1 << 20, size) * 2.0**-149
    elif kind == "adversarial":
        # Piled up on both sides of an edge of the default grid, one pattern below it and exactly on it, in sorted
        # order, with a few enormous outliers.
        edge = 1044480 * 1000
        codes = np.where(np.arange(size) < size * 0.985, edge - 1, edge).astype(np.int32)
        values = codes.view(np.float32).astype(np.float64)
        values[-7:] = np.finfo(np.float32).max
    else:
        raise ValueError(kind)
    return values.astype(np.float32)


KINDS = ["log-normal", "narrow", "constant", "mostly zero", "denormal", "adversarial"]


def sketch_of(values: np.ndarray | Tensor | list[float], like: QuantileSketch | None = None) -> QuantileSketch:
    sketch = QuantileSketch() if like is None else QuantileSketch(below=like.below, above=like.above, width=like.width)
    sketch.add(torch.as_tensor(values, dtype=torch.float32))
    return sketch


def best_count(ordered: np.ndarray, q: str) -> int:
    """Most entries at or above a positive number that keep within the share, from the sorted values."""
    budget = math.floor((1 - Fraction(q)) * len(ordered))
    if budget == 0:
        return 0
    # The budget's last entry is in if its equals are; otherwise the next greater value.
    last = ordered[len(ordered) - budget]
    count = len(ordered) - np.searchsorted(ordered, last, side="left")
    if count > budget:
        count = len(ordered) - np.searchsorted(ordered, last, side="right")
    return min(int(count), int(np.count_nonzero(ordered)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_is_never_exceeded_against_sort(kind: str) -> None:
    values = array_of(kind)
    ordered = np.sort(values)
    sketch = sketch_of(values)
    for q in QUANTILES:
        answer = sketch.quantile(float(q))
        at_or_above = len(ordered) - int(np.searchsorted(ordered, np.float32(answer.value), side="left"))
        assert answer.at_or_above == at_or_above
        assert 0 <= best_count(ordered, q) - at_or_above <= answer.rank_error <= sketch.rank_error_bound()


@pytest.mark.parametrize("kind", KINDS)
def test_two_refinements_are_exact(kind: str) -> None:
    values = array_of(kind)
    ordered = np.sort(values)
    for q in QUANTILES:
        sketch = sketch_of(values)
        for _ in range(2):
            sketch = sketch_of(values, like=sketch.refined(float(q)))
        answer = sketch.quantile(float(q))
        assert (answer.rank_error, answer.at_or_above) == (0, best_count(ordered, q))
        assert sketch.rank_error_bound() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_other_sketches_agree_within_their_own_error(kind: str) -> None:
    """KLL and REQ estimate ranks with random errors; ours are exact, so the difference is theirs alone."""
    import datasketches

    values = array_of(kind, size=200_003)
    ours = sketch_of(values)
    kll, req = datasketches.kll_floats_sketch(2000), datasketches.req_floats_sketch(100)
    kll.update(values)
    req.update(values)
    for q in QUANTILES:
        answer = ours.quantile(float(q))
        exact = 1 - answer.at_or_above / len(values)
        # Their error bounds hold with 99 % (KLL) and at 3 standard deviations (REQ); twice that never fails by chance.
        kll_rank = kll.get_rank(answer.value, inclusive=False)
        assert abs(kll_rank - exact) <= 2 * kll.normalized_rank_error(False)
        req_rank = req.get_rank(answer.value, inclusive=False)
        low, high = req.get_rank_lower_bound(req_rank, 3), req.get_rank_upper_bound(req_rank, 3)
        assert req_rank - 2 * (req_rank - low) - 1e-9 <= exact <= req_rank + 2 * (high - req_rank) + 1e-9
        # Their own quantile is one more candidate: none that keeps within the share beats ours by more than our bound.
        theirs = kll.get_quantile(float(q))
        count = int(np.count_nonzero(values >= theirs))
        if theirs > 0 and count <= math.floor((1 - Fraction(q)) * len(values)):
            assert count - answer.at_or_above <= answer.rank_error


def test_a_hundred_million_entries() -> None:
    """In pieces, never held at once: 3 passes find the exact quantile, and two counts prove it."""
    total, piece = 100_000_000, 10_000_000

    def pieces():
        for index in range(total // piece):
            generator = torch.Generator().manual_seed(index)
            # Uniform bit patterns over 30 binades: log-uniform values, at a tenth of the time of exp(normal).
            yield torch.randint(100 << 23, 130 << 23, (piece,), generator=generator, dtype=torch.int32)

    sketch = QuantileSketch()
    for round_index in range(3):
        if round_index:
            sketch = sketch.refined(0.99)
        for codes in pieces():
            sketch.add(codes.view(torch.float32))
        if round_index == 0:
            # Bins of 1044480 codes; 32 random bits modulo the range favour some codes by 6 %.
            assert sketch.rank_error_bound() == pytest.approx(total * 1044480 / (30 << 23), rel=0.08)
    answer = sketch.quantile(0.99)
    at, next_smaller = 0, 0
    for codes in pieces():
        at += int((codes >= answer.code).sum())
        next_smaller += int((codes >= answer.code - 1).sum())
    assert sketch.num_entries == total
    assert at == answer.at_or_above <= total // 100 < next_smaller
    assert answer.rank_error == 0


@given(numbers, numbers, numbers)
@settings(max_examples=100, deadline=None)
def test_merging_is_associative_commutative_and_the_sketch_of_all(
    one: list[float], two: list[float], three: list[float]
) -> None:
    for grid in (QuantileSketch(), QuantileSketch(width=7), QuantileSketch(below=5, above=900 << 20, width=33)):
        a, b, c = (sketch_of(values, like=grid) for values in (one, two, three))
        before = a.to_bytes()
        merged = a.merge(b).merge(c)
        assert merged == a.merge(b.merge(c)) == c.merge(b).merge(a)
        assert merged == sketch_of(one + two + three, like=grid)
        assert merged.num_entries == len(one) + len(two) + len(three)
        assert a.to_bytes() == before


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 7), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_padding_never_enters(sizes: list[int], world_size: int, seed: int) -> None:
    """Every rank's flat partition ends its slices in garbage; the merged sketch knows nothing of it."""
    rng = np.random.default_rng(seed)
    tensors = [torch.from_numpy(rng.choice([0.0, 0.5, 3.0], size).astype(np.float32)) for size in sizes]
    parameters = [Parameter(f"p{index}", (size,)) for index, size in enumerate(sizes)]
    merged = QuantileSketch()
    for rank in range(world_size):
        layout = build_layout([parameters], rank=rank, world_size=world_size, layer="tensor")
        flat = torch.full((layout.sub_group_numel[0],), 7e37)
        part = QuantileSketch()
        for segment, tensor in zip(layout.segments, tensors, strict=True):
            flat[segment.start : segment.stop] = tensor[segment.global_start :][: segment.real_numel]
            part.add(flat[segment.start : segment.stop])
        merged = merged.merge(part)
    assert merged == sketch_of(torch.cat(tensors))


@pytest.mark.parametrize("ratio", ["0.001", "0.01", "0.2", "0.5"])
def test_a_search_finds_what_a_refined_sketch_answers(ratio: str) -> None:
    values = torch.from_numpy(array_of("log-normal", size=20_011))
    q = 1 - Fraction(ratio)
    sketch = sketch_of(values)
    for _ in range(2):
        sketch = sketch_of(values, like=sketch.refined(q))
    found = find_thresholds(
        PartitionSketch([SegmentCodes(0, 0, lambda: [codes_of(values)])], num_layers=1),
        CountingExchange(),
        ratio=float(ratio),
        layer_numel=(values.numel(),),
        selection=Selection.PER_LAYER,
        normalizer=Normalizer.MINMAX,
    )
    assert sketch.quantile(q).code == int(found.codes[0])


@given(numbers, st.integers(1, 3000))
@settings(max_examples=100, deadline=None)
def test_the_wire_form_is_lossless_and_canonical(values: list[float], width: int) -> None:
    sketch = QuantileSketch(width=width)
    sketch.add(torch.tensor(values))
    data = sketch.to_bytes()
    read = QuantileSketch.from_bytes(data)
    assert read == sketch
    assert read.to_bytes() == data
    assert read.num_entries == len(values)
    assert len(data) <= 21 + 2 * (width + 2)
    if values:
        assert read.quantile(0.9) == sketch.quantile(0.9)


def test_the_wire_form_is_pinned() -> None:
    sketch = QuantileSketch(below=8, above=24, width=4)
    sketch.add(torch.tensor([0, 7, 8, 15, 16, 23, 24] + [20] * 200, dtype=torch.int32).view(torch.float32))
    body = b"EPIQ\x01\x08\0\0\0\x18\0\0\0\x04\0\0\0" + b"\x02\x01\x01\x01\xc9\x01\x01"
    assert sketch.to_bytes() == body + struct.pack("<I", zlib.crc32(body))


def test_a_large_count_keeps_every_bit() -> None:
    sketch = sketch_of([1.0] * 3)
    for _ in range(60):
        sketch = sketch.merge(sketch)
    assert QuantileSketch.from_bytes(sketch.to_bytes()).num_entries == 3 * 2**60


def _sealed(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


def _header(below: int = 0, above: int = 100, width: int = 2, version: int = 1) -> bytes:
    return struct.pack("<4sBIII", b"EPIQ", version, below, above, width)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (_sealed(b"NOPE" + _header()[4:] + bytes(4)), "begins with"),
        (_sealed(_header(version=2) + bytes(4)), "version 2"),
        (_header() + bytes(8), "checksum"),
        (_sealed(_header(width=0xFFFFFFFF) + bytes(4)), "cannot hold"),
        (_sealed(_header() + bytes(5)), "5 bins"),
        (_sealed(_header() + b"\0\0\0\x80"), "ends within"),
        (_sealed(_header() + b"\0\0\0\x80\0"), "leading zero"),
        (_sealed(_header() + b"\0\0\0" + b"\xff" * 9 + b"\x01"), "63 bits"),
        (_sealed(_header() + (b"\xff" * 8 + b"\x7f") * 4), "2^63"),
        (_sealed(_header(below=100) + bytes(4)), "below < above"),
        (_sealed(_header(above=TOP_CODE + 1) + bytes(4)), "below < above"),
    ],
)
def test_damaged_bytes_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(UserError) as raised:
        QuantileSketch.from_bytes(data)
    assert reason in str(raised.value)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_flipped_byte_is_noticed(data: st.DataObject) -> None:
    wire = bytearray(sketch_of(array_of("log-normal", size=100)).to_bytes())
    wire[data.draw(st.integers(0, len(wire) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(UserError):
        QuantileSketch.from_bytes(bytes(wire))


@pytest.mark.parametrize("bad", [-1.0, -0.0, math.inf, -math.inf, math.nan])
def test_what_has_no_order_is_refused_and_nothing_is_counted(bad: float) -> None:
    sketch = sketch_of([1.0, 2.0])
    with pytest.raises(UserError, match="non-negative finite"):
        sketch.add(torch.tensor([3.0, bad]))
    assert sketch == sketch_of([1.0, 2.0])


def test_mistakes_are_refused() -> None:
    with pytest.raises(UserError, match=r"float64.*convert"):
        QuantileSketch().add(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(UserError, match="one grid"):
        QuantileSketch().merge(QuantileSketch(width=3))
    with pytest.raises(UserError, match="empty sketch"):
        QuantileSketch().quantile(0.5)
    for q in (-0.1, 1.1, math.nan, math.inf):
        with pytest.raises(UserError, match=r"lies in \[0, 1\]"):
            sketch_of([1.0]).quantile(q)
    refined = sketch_of([1.0, 2.0, 3.0, 4.0]).refined(0.5)
    refined.add(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert refined.quantile(0.5).at_or_above == 2
    for q in (0.0, 0.99):
        with pytest.raises(UserError, match="lies outside"):
            refined.quantile(q)


@given(numbers.filter(len), st.integers(1, 400))
@settings(max_examples=100, deadline=None)
def test_quantiles_rise_and_keep_within_their_share(values: list[float], width: int) -> None:
    sketch = QuantileSketch(width=width)
    sketch.add(torch.tensor(values).view(1, -1))
    answers = [sketch.quantile(q) for q in (0, 0.3, 0.5, 0.7, 0.99, 1)]
    ordered = np.sort(np.array(values, dtype=np.float32))
    for q, answer in zip(("0", "0.3", "0.5", "0.7", "0.99", "1"), answers, strict=True):
        assert answer.at_or_above == np.count_nonzero(ordered >= np.float32(answer.value))
        assert 0 <= best_count(ordered, q) - answer.at_or_above <= answer.rank_error <= sketch.rank_error_bound()
    for one, other in pairwise(answers):
        assert one.code <= other.code
