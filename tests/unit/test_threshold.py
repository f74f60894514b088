"""The distributed search against a brute-force oracle, over cuts, ties and hostile values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from epi_ds.choices import Normalizer, Selection
from epi_ds.isolation.importance.codes import TOP_CODE, codes_of
from epi_ds.isolation.search.sketch import PartitionSketch, SegmentCodes, read_extremes
from epi_ds.isolation.search.threshold import Thresholds, budget_of, find_thresholds
from tests.support.oracle import oracle, oracle_masks
from tests.support.worlds import CountingExchange, ScatteringExchange, World, cut

GLOBAL = Selection.NORMALIZED_GLOBAL
CASES = [
    (GLOBAL, Normalizer.MINMAX),
    (GLOBAL, Normalizer.MEAN),
    (Selection.RAW_GLOBAL, Normalizer.MINMAX),
    (Selection.PER_LAYER, Normalizer.MINMAX),
]
# How a state stores importance, and the lattice of its codes. `adam` is fp32.
STATES = {"fp32": 0, "u16": 15, "bf16": 16, "u8": 0}
RATIOS = ["0.001", "0.01", "0.05", "0.2", "0.5"]


def search(
    layers: Sequence[np.ndarray],
    ratio: str,
    selection: Selection,
    normalizer: Normalizer,
    num_ranks: int = 1,
    *,
    code_shift: int = 0,
    world: World | None = None,
    exchange: CountingExchange | None = None,
) -> tuple[Thresholds, CountingExchange]:
    exchange = exchange or CountingExchange()
    found = find_thresholds(
        world or cut(layers, num_ranks, np.random.default_rng(num_ranks)),
        exchange,
        ratio=float(ratio),
        layer_numel=tuple(len(values) for values in layers),
        selection=selection,
        normalizer=normalizer,
        code_shift=code_shift,
    )
    return found, exchange


def masks_of(layers: Sequence[np.ndarray], found: Thresholds) -> list[np.ndarray]:
    return [values.view(np.int32) >= int(code) for values, code in zip(layers, found.codes, strict=True)]


def mixture(seed: int, num_layers: int) -> list[np.ndarray]:
    """Layers of odd sizes over many scales: log-normal, constant, two-valued, mostly zero, denormal, saturated."""
    rng = np.random.default_rng(seed)
    layers = []
    for index in range(num_layers):
        size = int(rng.integers(1, 400))
        scale = 10.0 ** rng.uniform(-20, 10)
        values = np.exp(rng.normal(0, rng.uniform(0.1, 4), size)) * scale
        kind = index % 9
        if kind == 1:
            values[:] = scale
        elif kind == 2:
            values = rng.choice([scale, 3 * scale], size)
        elif kind == 3:
            values[rng.random(size) < 0.9] = 0.0
        elif kind == 4:
            values = rng.integers(0, 2000, size) * 2.0**-149
        elif kind == 5:
            values[rng.integers(0, size)] = np.finfo(np.float32).max
        elif kind == 6:
            values += 1000 * scale
        layers.append(values.astype(np.float32))
    return layers


def stored(layers: Sequence[np.ndarray], state: str) -> list[np.ndarray]:
    """Round values to what a state can hold."""
    if state == "u8":
        return [_as_u8(values) for values in layers]
    lattice = ~((1 << STATES[state]) - 1)
    return [(values.view(np.int32) & lattice).view(np.float32) for values in layers]


def _as_u8(values: np.ndarray) -> np.ndarray:
    """Blocks of 256 entries, each in 255 steps of the square root of its largest."""
    blocks = np.zeros(-(-len(values) // 256) * 256, dtype=np.float32)
    blocks[: len(values)] = values
    largest = blocks.reshape(-1, 256).max(axis=1, keepdims=True).astype(np.float64)
    share = np.divide(blocks.reshape(-1, 256), largest, out=np.zeros((len(largest), 256)), where=largest > 0)
    return (np.round(np.sqrt(share) * 255) ** 2 / 255**2 * largest).astype(np.float32).reshape(-1)[: len(values)]


@pytest.mark.parametrize(("selection", "normalizer"), CASES)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_masks_equal_the_oracle(selection: Selection, normalizer: Normalizer, state: str, ratio: str) -> None:
    for seed in range(2):
        layers = stored(mixture(seed, num_layers=40), state)
        found, _ = search(layers, ratio, selection, normalizer, code_shift=STATES[state])
        expected = oracle(layers, ratio=ratio, selection=selection, normalizer=normalizer)
        for mask, truth in zip(masks_of(layers, found), expected.masks, strict=True):
            np.testing.assert_array_equal(mask, truth)
        # Never above the request, and the next smaller threshold would be.
        isolated = sum(int(mask.sum()) for mask in expected.masks)
        assert (found.budget, found.tied_mass) == (expected.budget, expected.tied_mass)
        assert isolated <= found.budget < isolated + found.tied_mass
        if selection is not GLOBAL:
            assert not (found.codes % (1 << STATES[state])).any()


@pytest.mark.parametrize(("selection", "normalizer"), CASES)
@pytest.mark.parametrize("state", ["fp32", "u16", "bf16"])
def test_the_lattice_changes_no_mask(selection: Selection, normalizer: Normalizer, state: str) -> None:
    layers = stored(mixture(5, num_layers=30), state)
    for ratio in RATIOS:
        coarse, _ = search(layers, ratio, selection, normalizer, code_shift=STATES[state])
        fine, _ = search(layers, ratio, selection, normalizer)
        for one, other in zip(masks_of(layers, coarse), masks_of(layers, fine), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("selection", "normalizer"), CASES)
def test_thresholds_do_not_depend_on_the_cut(selection: Selection, normalizer: Normalizer) -> None:
    layers = mixture(7, num_layers=60)
    reference, _ = search(layers, "0.05", selection, normalizer)
    for num_ranks in (2, 3, 4, 8, 64):
        found, _ = search(layers, "0.05", selection, normalizer, num_ranks)
        assert torch.equal(found.codes, reference.codes)
        assert found.tied_mass == reference.tied_mass


@pytest.mark.parametrize(("selection", "normalizer"), CASES)
@pytest.mark.parametrize("num_ranks", [8, 64, 1024])
def test_many_ranks_merged_in_any_order_find_the_same(
    selection: Selection, normalizer: Normalizer, num_ranks: int
) -> None:
    """Most pieces are empty, and most ranks of the largest world hold nothing at all."""
    layers = mixture(13, num_layers=18)
    reference, _ = search(layers, "0.05", selection, normalizer)
    for tree in (False, True):
        world = cut(layers, num_ranks, np.random.default_rng(num_ranks), tree=tree, empty=1 - 1 / num_ranks**0.5)
        exchange = ScatteringExchange(num_ranks) if selection is Selection.PER_LAYER else None
        found, _ = search(layers, "0.05", selection, normalizer, world=world, exchange=exchange)
        assert torch.equal(found.codes, reference.codes)
        assert (found.budget, found.tied_mass) == (reference.budget, reference.tied_mass)


def test_pieces_of_a_layer_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pieces are joined, large ones are not; neither may lose or repeat an entry."""
    layers = mixture(21, num_layers=9)
    whole = cut(layers, 1, np.random.default_rng(0)).parts[0]
    pieces = []
    for index, values in enumerate(layers):
        rng = np.random.default_rng(index)
        borders = np.sort(rng.integers(0, len(values) + 1, 40))
        codes = [codes_of(torch.from_numpy(part.copy())) for part in np.split(values, borders)]
        pieces += [
            SegmentCodes(index, 3 * index + number, partial(list, [part])) for number, part in enumerate(codes[:2])
        ]
        pieces.append(SegmentCodes(index, 3 * index + 2, partial(list, codes[2:])))
    edges = torch.arange(1, 2040).mul(1 << 20).repeat(9, 1)
    largest = read_extremes(whole.extremes()).max_codes
    for chunk_numel in (1, 10, 25, 100, 1 << 20):
        monkeypatch.setattr("epi_ds.isolation.search.sketch.CHUNK_NUMEL", chunk_numel)
        joined = PartitionSketch(pieces, num_layers=9)
        assert torch.equal(joined.counts(edges), whole.counts(edges))
        found = read_extremes(joined.extremes())
        assert torch.equal(found.max_codes, largest)
        assert torch.equal(found.min_codes, read_extremes(whole.extremes()).min_codes)
        for index, holder in enumerate(found.holders.tolist()):
            first = next(p for p in pieces if p.layer == index and any((c == largest[index]).any() for c in p.codes()))
            assert holder == first.parameter
        assert torch.equal(joined.fixed_point_sums(largest), whole.fixed_point_sums(largest))


@pytest.mark.parametrize("num_owners", [1, 2, 3, 7, 30, 31, 1024])
@pytest.mark.parametrize("code_shift", [0, 16])
def test_owners_answer_as_everyone_does(num_owners: int, code_shift: int) -> None:
    layers = stored(mixture(3, num_layers=30), "bf16")
    case = Selection.PER_LAYER, Normalizer.MINMAX
    everyone, _ = search(layers, "0.2", *case, code_shift=code_shift)
    owners, _ = search(layers, "0.2", *case, code_shift=code_shift, exchange=ScatteringExchange(num_owners))
    assert torch.equal(owners.codes, everyone.codes)
    assert owners.tied_mass == everyone.tied_mass


@pytest.fixture(scope="module")
def million() -> list[np.ndarray]:
    """1.2 million entries in 6 layers of different scales; no value is frequent."""
    rng = np.random.default_rng(0)
    return [(np.exp(rng.normal(0, 1.5, 200_003)) * 10.0**index).astype(np.float32) for index in range(6)]


@pytest.mark.parametrize(("selection", "normalizer"), CASES)
@pytest.mark.parametrize("state", ["fp32", "u16", "bf16"])
def test_the_achieved_ratio(
    million: list[np.ndarray], selection: Selection, normalizer: Normalizer, state: str
) -> None:
    layers = stored(million, state)
    total = sum(len(values) for values in layers)
    if state == "fp32":
        assert max(np.unique(np.concatenate(layers), return_counts=True)[1]) <= 1e-5 * total
    for ratio in ("0.01", "0.2"):
        found, _ = search(layers, ratio, selection, normalizer, code_shift=STATES[state])
        isolated = sum(int(mask.sum()) for mask in masks_of(layers, found))
        assert isolated <= found.budget < isolated + found.tied_mass
        if state == "fp32":
            assert abs(isolated / total - float(ratio)) <= 2e-5


@pytest.mark.parametrize(("code_shift", "expected"), [(0, (5, 6, 5, 4)), (15, (5, 6, 3, 3)), (16, (5, 6, 3, 3))])
def test_exchanges_do_not_grow_with_the_number_of_layers(code_shift: int, expected: tuple[int, ...]) -> None:
    for (selection, normalizer), number in zip(CASES, expected, strict=True):
        for num_layers in (1, 200):
            _, exchange = search(mixture(1, num_layers), "0.1", selection, normalizer, code_shift=code_shift)
            assert len(exchange.lengths) == number
            if selection is not Selection.PER_LAYER:
                # Extremes and sums are two integers a layer; the rounds do not know how many layers there are.
                assert max(exchange.lengths[-4 if code_shift == 0 else -2 :]) <= 512


def test_importance_that_is_not_finite_is_refused() -> None:
    layers = [np.array([1.0, 2.0, np.inf, np.inf], dtype=np.float32)]
    for case in CASES[2:]:
        with pytest.raises(RuntimeError, match="inf or nan"):
            search(layers, "0.3", *case)


@pytest.mark.parametrize(("selection", "normalizer"), CASES)
def test_never_more_than_the_budget_and_no_room_for_the_next_value(
    selection: Selection, normalizer: Normalizer
) -> None:
    rng = np.random.default_rng(0)
    layers = [np.exp(rng.normal(0, 2, 5001)).astype(np.float32) for _ in range(5)]
    found, _ = search(layers, "0.01", selection, normalizer)
    isolated = sum(int(mask.sum()) for mask in masks_of(layers, found))
    # Distinct values: the search stops at most one entry (per layer: one each) short of its budget.
    assert found.budget - len(layers) <= isolated <= found.budget


@given(st.integers(0, 10**6), st.sampled_from(["0.001", "0.01", "0.29", "0.5", "0.57", "0.999"]))
def test_budget_is_decimal(numel: int, ratio: str) -> None:
    whole, thousandths = 0, int(ratio.split(".")[1].ljust(3, "0"))
    assert budget_of(float(ratio), numel) == whole + numel * thousandths // 1000


def test_budget_where_binary_arithmetic_is_wrong() -> None:
    assert int(0.29 * 100) == 28
    assert budget_of(0.29, 100) == 29


@pytest.mark.parametrize(("selection", "normalizer"), CASES)
def test_ratio_zero_isolates_nothing(selection: Selection, normalizer: Normalizer) -> None:
    layers = mixture(3, num_layers=20)
    found, _ = search(layers, "0.0", selection, normalizer)
    assert not any(mask.any() for mask in masks_of(layers, found))


@pytest.mark.parametrize(("selection", "normalizer"), CASES)
def test_zeros_are_never_isolated(selection: Selection, normalizer: Normalizer) -> None:
    layers = [np.zeros(100, dtype=np.float32), np.array([0.0] * 99 + [1.0], dtype=np.float32)]
    found, _ = search(layers, "0.9", selection, normalizer)
    for values, mask in zip(layers, masks_of(layers, found), strict=True):
        assert not mask[values == 0].any()


def test_minmax_never_isolates_a_layers_minimum() -> None:
    rng = np.random.default_rng(0)
    layers = [np.concatenate([np.full(50, 0.7), 0.7 + rng.random(50)]).astype(np.float32)]
    found, _ = search(layers, "0.9", GLOBAL, Normalizer.MINMAX)
    (mask,) = masks_of(layers, found)
    assert not mask[layers[0] == layers[0].min()].any()
    assert mask.sum() == 50


def test_ties_at_the_maximum_isolate_nothing_under_minmax() -> None:
    layers = [np.array([1.0] * 50 + [2.0] * 50, dtype=np.float32), np.arange(100, dtype=np.float32)]
    found, _ = search(layers, "0.1", GLOBAL, Normalizer.MINMAX)
    assert not any(mask.any() for mask in masks_of(layers, found))


@pytest.mark.parametrize("normalizer", [Normalizer.MINMAX, Normalizer.MEAN])
def test_a_constant_layer_never_isolates(normalizer: Normalizer) -> None:
    layers = [np.full(10, 5.0, dtype=np.float32), np.arange(10, dtype=np.float32)]
    found, _ = search(layers, "0.5", GLOBAL, normalizer)
    assert int(found.codes[0]) >= TOP_CODE


def test_flush_to_zero_changes_nothing() -> None:
    layers = mixture(11, num_layers=30)
    reference = [search(layers, "0.2", *case)[0].codes for case in CASES]
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        for case, codes in zip(CASES, reference, strict=True):
            assert torch.equal(search(layers, "0.2", *case)[0].codes, codes)
    finally:
        torch.set_flush_denormal(False)


@given(
    st.lists(
        st.lists(st.floats(0, 3.4028234663852886e38, width=32), min_size=1, max_size=30),
        min_size=1,
        max_size=6,
    )
)
# Ones beside 2^53 are below the resolution of the mean, and with them a tie of two layers would be none.
@example([[0.0, 0.0, 1.0], [1.0, 1.0, 2.0**53]])
@settings(max_examples=150, deadline=None)
def test_any_finite_values_equal_the_oracle(values: list[list[float]]) -> None:
    layers = [np.array(v, dtype=np.float32) for v in values]
    for selection, normalizer in CASES:
        found, _ = search(layers, "0.3", selection, normalizer, num_ranks=3)
        expected = oracle_masks(layers, ratio="0.3", selection=selection, normalizer=normalizer)
        for mask, truth in zip(masks_of(layers, found), expected, strict=True):
            np.testing.assert_array_equal(mask, truth)
