"""The same importance gives the same masks at every world size, and they are the oracle's."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from epi_ds.choices import Normalizer, Selection
from epi_ds.errors import UserError
from epi_ds.isolation.counters import Counters
from epi_ds.isolation.layout import Segment, block_of, kind_of
from epi_ds.isolation.refresh_report import RefreshReport
from epi_ds.kernels import Stored
from tests.support.engines import (
    PARTIAL_OFFLOAD,
    collected_logs,
    ds_config,
    engine_of,
    full_importance,
    full_masks,
    train_step,
)
from tests.support.models import OddNet, odd_batch
from tests.support.oracle import oracle_masks
from tests.support.ranks import run_ranks
from tests.support.tiers import slow_but, values_first

pytestmark = pytest.mark.zero3

SELECTIONS: list[dict[str, Any]] = [
    {"selection": "normalized_global", "normalizer": "minmax"},
    {"selection": "normalized_global", "normalizer": "mean"},
    {"selection": "raw_global"},
    {"selection": "per_layer"},
    {"selection": "normalized_global", "normalizer": "minmax", "layer": "tensor"},
]


def given_importance() -> dict[str, Tensor]:
    """Importance over many scales, with zeros and ties, for every parameter of OddNet."""
    generator = torch.Generator().manual_seed(5)
    given = {}
    for index, (name, parameter) in enumerate(OddNet().named_parameters()):
        values = torch.randn(parameter.shape, generator=generator).mul(3).exp() * 10.0 ** (index - 12)
        values[torch.rand(parameter.shape, generator=generator) < 0.1] = 0.0
        given[name] = values
    return given


def restore(engine: Any, given: dict[str, Tensor]) -> None:
    """Give the engine this importance, as loading a checkpoint does. Collective."""

    def stored_of(_: str, segment: Segment) -> Stored:
        first = segment.global_start
        return Stored(given[segment.name].flatten()[first : first + segment.real_numel], torch.zeros(0), first)

    engine.epi.controller.restore(
        counters=Counters(),
        threshold_codes=None,
        mask_of=lambda segment: torch.zeros(segment.real_numel, dtype=torch.bool),
        states=["importance"],
        stored_of=stored_of,
    )
    engine.epi.controller.refresher.add_up()


def expected_masks(importance: dict[str, Tensor], section: dict[str, Any]) -> dict[str, Tensor]:
    """Ask the oracle, over whole tensors grouped into layers."""
    layer_of = (lambda name: name) if section.get("layer") == "tensor" else block_of
    layers: dict[str, list[str]] = {}
    for name in importance:
        layers.setdefault(layer_of(name), []).append(name)
    arrays = [torch.cat([importance[n].flatten() for n in names]).numpy() for names in layers.values()]
    masks = oracle_masks(
        arrays,
        ratio=str(section["ratio"]),
        selection=Selection(section["selection"]),
        normalizer=Normalizer(section.get("normalizer", "minmax")),
    )
    result = {}
    for names, mask in zip(layers.values(), masks, strict=True):
        parts = np.split(mask, np.cumsum([importance[n].numel() for n in names])[:-1])
        for name, part in zip(names, parts, strict=True):
            result[name] = torch.from_numpy(part.copy()).view(importance[name].shape)
    return result


def select_masks(
    exchange: str, changes: dict[str, Any], state: str = "fp32"
) -> list[tuple[dict[str, Tensor], dict[str, float]]]:
    results = []
    for selection in SELECTIONS:
        # Only layers can be dealt to ranks; for the other selections the value is an error.
        usable = exchange != "reduce_scatter" or selection["selection"] == "per_layer"
        section = {"ratio": 0.1, "exchange": exchange if usable else "auto", "state": state, **selection}
        with engine_of(OddNet, ds_config(epi=section, **changes)) as engine:
            restore(engine, given_importance())
            engine.epi.refresh_now()
            results.append((full_masks(engine), engine.epi.thresholds()))
    return results


@lru_cache
def _reference(state: str = "fp32") -> list[tuple[dict[str, Tensor], dict[str, float]]]:
    return run_ranks(select_masks, 1, "all_gather", {}, state)[0]


def _assert_equal(results: list[Any], state: str = "fp32") -> None:
    for rank_result in results:
        for (masks, thresholds), (reference_masks, reference_thresholds) in zip(
            rank_result, _reference(state), strict=True
        ):
            assert thresholds == reference_thresholds
            for name in reference_masks:
                assert torch.equal(masks[name], reference_masks[name]), name


def test_masks_of_one_rank_equal_the_oracle() -> None:
    for (masks, _), selection in zip(_reference(), SELECTIONS, strict=True):
        expected = expected_masks(given_importance(), {"ratio": 0.1, **selection})
        assert sum(int(mask.sum()) for mask in masks.values()) > 0
        for name in expected:
            assert torch.equal(masks[name], expected[name]), (selection, name)


@pytest.mark.parametrize(
    ("world_size", "exchange"),
    values_first([*itertools.product([2, 3, 4], ["all_gather", "all_reduce"]), (3, "reduce_scatter")]),
)
def test_masks_do_not_depend_on_the_world_size_or_the_transport(world_size: int, exchange: str) -> None:
    _assert_equal(run_ranks(select_masks, world_size, exchange, {}))


@pytest.mark.parametrize("state", slow_but(["bf16", "u16"], "u16"))
def test_masks_of_16_bit_states_do_not_depend_on_the_world_size(state: str) -> None:
    """The same importance is rounded to the same codes wherever a parameter is cut."""
    _assert_equal(run_ranks(select_masks, 3, "auto", {}, state), state)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"offload": True}, PARTIAL_OFFLOAD, {"zero_optimization": {"sub_group_size": 30}}],
    ids=["offload", "partial-offload", "sub-groups"],
)
def test_masks_do_not_depend_on_the_placement(changes: dict[str, Any]) -> None:
    _assert_equal(run_ranks(select_masks, 2, "auto", changes))


def check_report(engine: Any, refresh: RefreshReport, selection: dict[str, Any], masks: dict[str, Tensor]) -> None:
    """What the refresh says of layers and kinds is what the gathered tensors say."""
    importance = full_importance(engine)
    rows = {row.name: row.parameters for row in engine.epi.layers()}
    assert [layer.name for layer in refresh.layers] == list(rows)
    for layer, found in zip(refresh.layers, refresh.importance, strict=True):
        values = {name: importance[name] for name in rows[layer.name]}
        assert layer.numel == sum(value.numel() for value in values.values())
        assert layer.isolated == sum(int(masks[name].sum()) for name in values)
        assert found.largest == max(float(value.max()) for value in values.values())
        assert found.smallest == min(float(value.min()) for value in values.values())
        assert found.largest == float(values[found.largest_in].max())
        assert found.threshold == engine.epi.thresholds()[layer.name]
    for kind in refresh.kinds:
        members = [name for name in masks if kind_of(name) == kind.name]
        assert (kind.numel, kind.isolated) == tuple(
            sum(count) for count in zip(*((masks[n].numel(), int(masks[n].sum())) for n in members), strict=True)
        )
    assert sum(kind.numel for kind in refresh.kinds) == refresh.covered
    # The first refresh was after step 2, this is the one after step 4.
    assert refresh.jaccard is not None
    assert refresh.jaccard_first is None or 0 <= refresh.jaccard_first <= 1


def check_trained_masks(state: str) -> None:
    """Masks of a real run are the oracle's for the importance that the run had at its refresh."""
    for selection in SELECTIONS:
        section = {"ratio": 0.1, "refresh_interval": 2, "state": state, **selection}
        section |= {"apply": "update"} if state == "adam" else {"ema_decay": 0.9}
        with engine_of(OddNet, ds_config(epi=section)) as engine:
            for step in range(4):
                train_step(engine, step, odd_batch)
            expected = expected_masks(full_importance(engine), section)
            for name, mask in full_masks(engine).items():
                assert torch.equal(mask, expected[name]), (selection, name)
            refresh = engine.epi.stats().last_refresh
            assert refresh is not None
            assert refresh.isolated == sum(int(mask.sum()) for mask in expected.values()) > 0
            # Round 0, the mean's sums, three or four rounds, and one exchange for the counts of this report; where
            # owners answer for their layers, two collectives a round.
            assert 4 <= refresh.collectives <= 7
            assert refresh.isolated <= refresh.budget < refresh.isolated + refresh.tied_mass
            check_report(engine, refresh, selection, expected)


@pytest.mark.parametrize(
    ("world_size", "state"), values_first(itertools.product([3, 1], ["fp32", "bf16", "u16", "u8", "adam"]))
)
def test_masks_of_a_run_equal_the_oracle(world_size: int, state: str) -> None:
    run_ranks(check_trained_masks, world_size, state)


def check_coverage() -> None:
    section = {"ratio": 0.3, "refresh_interval": 1, "include": ["blocks"], "exclude": ["bias$"]}
    with engine_of(OddNet, ds_config(epi=section)) as engine:
        assert engine.epi.parameter_names == ("blocks.0.weight", "blocks.1.weight")
        assert [row.name for row in engine.epi.layers()] == ["blocks.0", "blocks.1"]
        train_step(engine, 0, odd_batch)
        masks = full_masks(engine)
        isolated = sum(int(mask.sum()) for mask in masks.values())
        assert isolated == engine.epi.stats().isolated == int(0.3 * 2 * 169)
        weights = {n: p.ds_tensor.clone() for n, p in engine.module.named_parameters()}
        train_step(engine, 1, odd_batch)
        # Uncovered parameters have no mask and move as ever.
        for name, parameter in engine.module.named_parameters():
            if name not in masks and parameter.ds_tensor.numel() > 1 and "embed" not in name:
                assert not torch.equal(parameter.ds_tensor, weights[name]), name


def test_only_covered_parameters_are_isolated() -> None:
    run_ranks(check_coverage, 1)


def check_blocked(selection: dict[str, Any]) -> list[str]:
    """Every entry but one of every layer sits at the layer's maximum."""
    given = {name: torch.full_like(values, 2.0) for name, values in given_importance().items()}
    for name in ("embed.weight", "blocks.0.weight", "blocks.1.weight", "norm.weight", "head.weight", "scale.weight"):
        given[name].view(-1)[0] = 1.0
    with engine_of(OddNet, ds_config(epi={"ratio": 0.1, **selection})) as engine, collected_logs() as messages:
        restore(engine, given)
        engine.epi.refresh_now()
        assert engine.epi.stats().isolated == 0
        # The ranks are still in step.
        train_step(engine, 0, odd_batch)
    return messages


def test_a_budget_that_ties_leave_unused_is_said_with_the_layer() -> None:
    first, second = run_ranks(check_blocked, 2, {})
    # blocks.0 and blocks.1 have 182 entries each, the most of all layers; the first of equals is named.
    assert any("isolated 0 entries of the 57 that ratio 0.1 allows; layer 'blocks.0' has 181" in text for text in first)
    assert not any("isolated 0 entries" in text for text in second)
    (first, _) = run_ranks(check_blocked, 2, {"selection": "per_layer"})
    assert any("isolated 0 entries of the" in text for text in first)


def check_static_without_probe() -> None:
    section = {"policy": "static", "probe_steps": 2, "ratio": 0.2}
    with (
        engine_of(OddNet, ds_config(epi=section)) as engine,
        pytest.raises(RuntimeError, match=r"has no mask yet.*call engine\.epi\.probe"),
    ):
        train_step(engine, 0, odd_batch)
    with engine_of(OddNet, ds_config(epi=section | {"ratio": 0.0})) as engine:
        train_step(engine, 0, odd_batch)
    with (
        engine_of(OddNet, ds_config(epi={"policy": "none"})) as engine,
        pytest.raises(UserError, match="set policy: static"),
    ):
        engine.epi.probe(engine(*odd_batch(index, 0, 0)) for index in range(2))


def test_a_static_policy_does_not_step_before_its_probe() -> None:
    run_ranks(check_static_without_probe, 2)
