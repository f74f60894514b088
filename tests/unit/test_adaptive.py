"""Drift and coverage read off a preview, against what sorting says; and searches that go on from one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from epi_ds.choices import Normalizer, Selection
from epi_ds.isolation.importance.codes import TOP_CODE
from epi_ds.isolation.search.adaptive import covering_budgets, drift_of
from epi_ds.isolation.search.threshold import SearchPlan, ThresholdSearch, find_thresholds, global_edges, layer_edges
from tests.support.worlds import CountingExchange, World, cut

CASES = [
    (Selection.NORMALIZED_GLOBAL, Normalizer.MINMAX),
    (Selection.NORMALIZED_GLOBAL, Normalizer.MEAN),
    (Selection.RAW_GLOBAL, Normalizer.MINMAX),
    (Selection.PER_LAYER, Normalizer.MINMAX),
]


def layers_of(seed: int, shift: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    layers = [np.exp(rng.normal(0, 1.5, int(rng.integers(100, 4000)))).astype(np.float32) for _ in range(12)]
    for values in layers[::3]:
        values[rng.random(len(values)) < 0.3] = 0.0
    return [(values.view(np.int32) & ~((1 << shift) - 1)).view(np.float32) for values in layers]


def world_of(layers: list[np.ndarray], num_ranks: int) -> World:
    return cut(layers, num_ranks, np.random.default_rng(num_ranks))


def search_of(layers: list[np.ndarray], case: tuple[Selection, Normalizer], exchange: CountingExchange, shift: int = 0):
    return ThresholdSearch(
        world_of(layers, 3),  # type: ignore[arg-type]
        exchange,
        SearchPlan(tuple(len(values) for values in layers), *case, code_shift=shift),
    )


@pytest.mark.parametrize("unit", [1, 1 << 15, 1 << 16])
@pytest.mark.parametrize("near", [None, 1 << 16, 0x3F800000, 0x3F810000, TOP_CODE - (1 << 16)])
def test_the_grid_of_a_preview_covers_every_code(near: int | None, unit: int) -> None:
    around = None if near is None else torch.tensor([near])
    edges = global_edges(around, unit=unit)
    assert (edges[0, 0], edges[0, -1]) == (unit, TOP_CODE)
    assert edges.shape[1] <= 1024
    # Of a layer the grid ends above its own maximum.
    for largest in (-1, 0, 1 << 16, 0x3F800000, TOP_CODE - (1 << 16)):
        of_layer = layer_edges(
            torch.tensor([largest, 0x3F800000]), None if near is None else torch.full((2,), near), unit=unit
        )
        assert of_layer[0, 0] == unit
        assert of_layer[0, -1] > largest
        assert of_layer.shape[1] <= 385
        edges = torch.cat([edges.flatten(), of_layer[0]]).sort().values.unsqueeze(0)
        assert (of_layer.diff(dim=1) >= 0).all()
    assert (edges.diff(dim=1) >= 0).all()
    assert (edges > 0).all()
    assert (edges % unit == 0).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shift", [0, 15])
@pytest.mark.parametrize("near", [None, "last", 1 << 20])
@pytest.mark.parametrize("ratio", [0.05, 0.8])
def test_a_search_goes_on_from_a_preview(
    case: tuple[Selection, Normalizer], shift: int, near: object, ratio: float
) -> None:
    """At a ratio of 0.8 some layers have fewer positive entries than their budget."""
    layers = layers_of(1, shift)
    settings = {"layer_numel": tuple(len(v) for v in layers), "selection": case[0], "normalizer": case[1]}
    exchange = CountingExchange()
    whole = find_thresholds(
        world_of(layers, 1),  # type: ignore[arg-type]
        CountingExchange(),
        ratio=ratio,
        code_shift=shift,
        **settings,  # type: ignore[arg-type]
    )
    search = search_of(layers, case, exchange, shift)
    none = cut([values[:0] for values in layers], 3, np.random.default_rng(0))
    around = torch.full_like(whole.row_codes, near) if isinstance(near, int) else whole.row_codes if near else None
    search.preview(none, near=around)  # type: ignore[arg-type]
    found = search.finish(search.budgets(ratio))
    assert torch.equal(found.codes, whole.codes)
    assert torch.equal(found.row_codes, whole.row_codes)
    assert (found.budget, found.tied_mass) == (whole.budget, whole.tied_mass)
    # Extremes, the mean's sums, the preview, and at most two rounds, of two collectives where owners answer; the counts
    # of the report come on top.
    assert len(exchange.lengths) <= 5
    if case[0] is Selection.PER_LAYER:
        # Scaled to 1000 layers: sums to everyone of the preview, to owners of the rounds. 20 MB are allowed.
        preview_length, *rounds = (length / len(layers) * 4000 for length in exchange.lengths[1:])
        assert 2 * preview_length + sum(rounds) <= 19e6
    if near == "last":
        assert max(exchange.lengths) <= 2 * (1024 if case[0] is not Selection.PER_LAYER else 385 * len(layers))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("change", [0.0, 0.02, 0.3])
def test_drift_lies_within_its_bounds(case: tuple[Selection, Normalizer], change: float) -> None:
    """Importance changes after a mask was selected; the true drift comes from selecting again."""
    before = layers_of(2)
    numel = tuple(len(values) for values in before)
    settings = {"ratio": 0.1, "layer_numel": numel, "selection": case[0], "normalizer": case[1]}
    first = find_thresholds(world_of(before, 1), CountingExchange(), **settings)  # type: ignore[arg-type]
    masks = [values.view(np.int32) >= int(code) for values, code in zip(before, first.codes, strict=True)]
    rng = np.random.default_rng(3)
    now = [(values * np.exp(rng.normal(0, change, len(values)))).astype(np.float32) for values in before]
    second = find_thresholds(world_of(now, 1), CountingExchange(), **settings)  # type: ignore[arg-type]
    isolated = sum(int(mask.sum()) for mask in masks)
    kept = sum(
        int((mask & (values.view(np.int32) >= int(code))).sum())
        for mask, values, code in zip(masks, now, second.codes, strict=True)
    )
    search = search_of(now, case, CountingExchange())
    held = cut([values[mask] for values, mask in zip(now, masks, strict=True)], 3, np.random.default_rng(4))
    preview = search.preview(held, near=first.row_codes)  # type: ignore[arg-type]
    assert int(preview.isolated[:, 0].sum()) == isolated
    budgets = search.budgets(0.1)
    drift = drift_of(preview, budgets=budgets, isolated=isolated)
    assert drift.at_least <= 1 - kept / isolated <= drift.at_most
    assert drift.growth == 0.0
    # A budget that grows releases nothing, and still the mask is not the one asked for.
    grown = drift_of(preview, budgets=3 * budgets, isolated=isolated)
    assert grown.at_most < 0.05
    assert grown.growth == pytest.approx(2 / 3, abs=0.15)
    # Edges around the last threshold are 0.14 to 0.2 % apart, and few entries lie between two of them.
    assert drift.at_most - drift.at_least < 0.02


@pytest.mark.parametrize("coverage", [0.1, 0.5, 0.9])
def test_the_covering_budget_holds_the_share_asked_for(coverage: float) -> None:
    layers = layers_of(5)
    values = np.sort(np.concatenate(layers).astype(np.float64))[::-1]
    search = search_of(layers, CASES[2], CountingExchange())
    preview = search.preview(cut([v[:0] for v in layers], 3, np.random.default_rng(0)), near=None)  # type: ignore[arg-type]
    budget = int(covering_budgets(preview, coverage=coverage))
    held = values[:budget].sum() / values.sum()
    # Entries count as the mean of edges that are half a binade apart.
    assert held == pytest.approx(coverage, abs=0.02)


@pytest.mark.parametrize("coverage", [0.1, 0.5, 0.9])
def test_every_layer_has_a_covering_budget_of_its_own(coverage: float) -> None:
    # Up to 2^110 apart, and a layer of zeros.
    layers = [values * np.float32(2.0**power) for values, power in zip(layers_of(5), range(-80, 40, 10), strict=True)]
    layers.append(np.zeros(50, dtype=np.float32))
    search = search_of(layers, CASES[3], CountingExchange())
    preview = search.preview(None, near=None)
    budgets = covering_budgets(preview, coverage=coverage).tolist()
    assert budgets[-1] == 0
    for values, budget in zip(layers[:-1], budgets, strict=False):
        wide = np.sort(values.astype(np.float64))[::-1]
        assert wide[:budget].sum() / wide.sum() == pytest.approx(coverage, abs=0.04)


def test_importance_of_nothing_covers_nothing() -> None:
    layers = [np.zeros(100, dtype=np.float32)]
    search = search_of(layers, CASES[2], CountingExchange())
    preview = search.preview(cut([v[:0] for v in layers], 3, np.random.default_rng(0)), near=None)  # type: ignore[arg-type]
    assert covering_budgets(preview, coverage=0.5).tolist() == [0]
