"""When and how much a run isolates, what it remembers of finished stages, and who stays isolated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from epi_ds.choices import StateFormat
from epi_ds.config import EPIConfig
from epi_ds.errors import UserError
from epi_ds.isolation.importance.remembered import RELATIVE, Remembered
from epi_ds.isolation.importance.stored import StoredImportance
from epi_ds.isolation.layout import Parameter, build_layout
from epi_ds.isolation.mask import Masks
from epi_ds.isolation.placement import Placement
from epi_ds.isolation.search.compare import compare
from epi_ds.kernels import Stored, pack_bits
from tests.support.engines import (
    assert_same,
    collected_logs,
    ds_config,
    engine_of,
    full_importance,
    full_masks,
    full_state,
    full_weights,
    train_step,
)
from tests.support.models import OddNet, odd_batch
from tests.support.ranks import run_ranks
from tests.support.tasks import WholeSelection
from tests.support.worlds import CountingExchange
from tests.zero3.test_masks import expected_masks

pytestmark = pytest.mark.zero3

SELECTION = {"selection": "raw_global"}
CPU = torch.device("cpu")


def check_ratio_schedule() -> list[tuple[int, float, int, int]]:
    section = {
        "ratio": {"schedule": "linear", "start": 0.4, "end": 0.1, "steps": 6},
        "refresh_interval": 2,
        "warmup_steps": 3,
        "ema_decay": 0.9,
        **SELECTION,
    }
    seen = []
    with engine_of(OddNet, ds_config(epi=section)) as engine:
        for step in range(12):
            train_step(engine, step, odd_batch)
            refresh = engine.epi.stats().last_refresh
            if refresh is not None and (not seen or seen[-1][0] != refresh.step):
                seen.append((refresh.step, refresh.ratio, refresh.isolated, engine.epi.stats().covered))
        assert engine.epi.stats().counters.active_steps == 8
    return seen


def test_a_scheduled_ratio_begins_after_the_warm_up_and_ends_where_it_says() -> None:
    seen = run_ranks(check_ratio_schedule, 2)[0]
    assert [(step, ratio) for step, ratio, *_ in seen] == [(4, 0.35), (6, 0.25), (8, 0.15), (10, 0.1), (12, 0.1)]
    for _, ratio, isolated, covered in seen:
        # Unused embedding rows are zero and there are ties, both at the lower end.
        assert 0.9 * ratio * covered < isolated <= ratio * covered


def check_hysteresis(hysteresis: float) -> tuple[int, int]:
    """Return how many entries the second mask kept and how many it has; the mask is the oracle's."""
    section = {"ratio": 0.2, "refresh_interval": 2, "ema_decay": 0.3, "hysteresis": hysteresis, **SELECTION}
    with engine_of(OddNet, ds_config(epi=section)) as engine:
        for step in range(2):
            train_step(engine, step, odd_batch)
        first = full_masks(engine)
        for step in range(2, 4):
            train_step(engine, step, odd_batch)
        importance, second = full_importance(engine), full_masks(engine)
        compared = {name: torch.where(first[name], values / hysteresis, values) for name, values in importance.items()}
        for name, mask in expected_masks(compared, section).items():
            assert torch.equal(second[name], mask), name
    return sum(int((first[n] & second[n]).sum()) for n in first), sum(int(mask.sum()) for mask in second.values())


@pytest.mark.parametrize("world_size", [1, 3])
def test_hysteresis_changes_who_is_isolated_and_not_how_many(world_size: int) -> None:
    plain, with_hysteresis = (run_ranks(check_hysteresis, world_size, factor)[0] for factor in (1.0, 0.125))
    assert with_hysteresis[0] > plain[0] > 0
    assert with_hysteresis[1] == pytest.approx(plain[1], abs=1)


def test_hysteresis_acts_across_layers_under_every_normalizer() -> None:
    """Entries 1.2 times larger in another layer do not evict isolated ones at a factor of 2."""
    layout = build_layout([[Parameter("0.w", (6,)), Parameter("1.w", (6,))]], rank=0, world_size=1, layer="block")
    placement = Placement(layout, (CPU,))
    importance = StoredImportance(placement, StateFormat.FP32, seed=0, purpose="importance")
    values = {"0.w": [1.0, 0.97, 0.95, 0.9, 0.01, 0.0], "1.w": [1.0, 0.8, 0.75, 0.7, 0.01, 0.0]}
    for segment in layout.segments:
        importance.load(segment, Stored(torch.tensor(values[segment.name]), torch.zeros(0), 0), step=0)
    bits = torch.empty(2, dtype=torch.uint8)
    pack_bits(torch.tensor([False] * 6 + [True] * 4 + [False] * 2), bits)
    for changes in ({"normalizer": "minmax"}, {"normalizer": "mean"}, SELECTION):
        kept = []
        for hysteresis in (1.0, 0.5):
            config = EPIConfig.model_validate({"ratio": 0.34, "hysteresis": hysteresis, **changes})
            masks, remembered = Masks(placement), Remembered(placement, config)
            masks.bits[0] = bits
            exchange = CountingExchange()
            comparison = compare(importance, remembered, masks, config=config, exchange=exchange, step=1)
            thresholds = comparison.search.finish(comparison.search.budgets(0.34))
            segment = layout.by_name["1.w"]
            codes = comparison.compared.read(segment, 0, 6).view(torch.int32)
            kept.append(int((codes[:4] >= thresholds.codes[1]).sum()))
        assert kept[0] < kept[1] == 4, changes


def check_adaptive_refresh(folder: str, max_drift: float, selection: str) -> list[tuple[int, bool]]:
    """Return after which looks the mask was refreshed; a run resumed in between decides as the whole one."""
    section = {
        "ratio": 0.2,
        "refresh_interval": "adaptive",
        "check_interval": 2,
        "max_drift": max_drift,
        "ema_decay": 0.5,
        "selection": selection,
    }

    def train(engine: Any, first: int) -> list[tuple[int, bool]]:
        seen = []
        for step in range(first, 10):
            isolated, before = engine.epi.stats().isolated, full_masks(engine)
            train_step(engine, step, odd_batch)
            if (step + 1) % 2:
                continue
            decision, after, importance = engine.epi.stats().last_decision, full_masks(engine), full_importance(engine)
            refreshed = decision.thresholds is not None
            seen.append((step + 1, refreshed))
            assert decision.ratio == 0.2
            assert (decision.drift is None) == (isolated == 0)
            wanted = expected_masks(importance, section)
            for name in after:
                assert torch.equal(after[name], wanted[name] if refreshed else before[name]), name
            if decision.drift is not None:
                kept = sum(int((before[name] & wanted[name]).sum()) for name in before)
                assert decision.drift.at_least <= 1 - kept / isolated <= decision.drift.at_most
                assert refreshed == (max(decision.drift.at_most, decision.drift.growth) > max_drift)
        return seen

    config = ds_config(epi=section)
    with engine_of(OddNet, config) as engine:
        for step in range(4):
            train_step(engine, step, odd_batch)
        engine.save_checkpoint(folder, "tag")
        seen, weights = train(engine, 4), full_weights(engine)
    with engine_of(OddNet, config) as engine:
        engine.load_checkpoint(folder, "tag")
        assert train(engine, 4) == seen
        assert_same(full_weights(engine), weights)
    return seen


@pytest.mark.parametrize(
    ("max_drift", "refreshes", "selection"),
    [
        pytest.param(0.0, {3}, "raw_global", marks=pytest.mark.slow),
        (0.3, {1, 2}, "raw_global"),
        (1.0, {0}, "raw_global"),
        (0.0, {3}, "per_layer"),
        pytest.param(0.3, {1, 2}, "per_layer", marks=pytest.mark.slow),
    ],
)
def test_an_adaptive_run_refreshes_masks_that_have_drifted(
    tmp_path: Path, max_drift: float, refreshes: set[int], selection: str
) -> None:
    seen = run_ranks(check_adaptive_refresh, 2, str(tmp_path), max_drift, selection)[0]
    assert sum(refreshed for _, refreshed in seen) in refreshes


def check_growing_ratio() -> None:
    """A ratio that grows releases nothing, and the mask still follows it."""
    section = {
        "ratio": {"schedule": "linear", "start": 0.05, "end": 0.4, "steps": 10},
        "refresh_interval": "adaptive",
        "check_interval": 2,
        "max_drift": 0.3,
        "ema_decay": 0.999,
        **SELECTION,
    }
    with engine_of(OddNet, ds_config(epi=section)) as engine:
        for step in range(12):
            train_step(engine, step, odd_batch)
        stats = engine.epi.stats()
        assert stats.isolated > 0.28 * stats.covered
        assert stats.counters.refreshes < 6


def test_an_adaptive_run_follows_a_growing_ratio() -> None:
    run_ranks(check_growing_ratio, 2)


def check_adaptive_ratio(selection: str) -> None:
    section = {"ratio": "adaptive", "coverage": 0.6, "max_ratio": 0.5, "refresh_interval": 2, "ema_decay": 0.9}
    with engine_of(OddNet, ds_config(epi=section | {"selection": selection})) as engine:
        for step in range(4):
            train_step(engine, step, odd_batch)
        refresh = engine.epi.stats().last_refresh
        assert refresh is not None
        assert 0 < refresh.ratio <= 0.5
        assert refresh.budget == round(refresh.ratio * engine.epi.stats().covered)
        importance, masks = full_importance(engine), full_masks(engine)
        layers = [layer.parameters for layer in engine.epi.layers()]
        for names in layers if selection == "per_layer" else [sum(layers, ())]:
            values = torch.cat([importance[name].flatten() for name in names])
            isolated = values[torch.cat([masks[name].flatten() for name in names])]
            if len(isolated) == int(0.5 * len(values)):
                continue
            # Entries count as the mean of a bin half a binade wide, so shares are right to about a fifth.
            assert isolated.sum() / values.sum() > 0.5
            assert (isolated.sum() - isolated.min()) / values.sum() < 0.7
        assert refresh.collectives <= 8


@pytest.mark.parametrize("selection", ["raw_global", "per_layer"])
def test_an_adaptive_ratio_holds_the_importance_asked_for(selection: str) -> None:
    run_ranks(check_adaptive_ratio, 2, selection)


def remembered(engine: Any) -> dict[str, Tensor]:
    """Gather what is remembered. Collective."""
    return full_state(engine, RELATIVE)


def divided(importance: dict[str, Tensor]) -> dict[str, Tensor]:
    """Importance over its mean, by whole tensors."""
    entries = torch.cat([values.flatten() for values in importance.values()]).double()
    return {name: (values.double() / entries.mean()).float() for name, values in importance.items()}


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], *, state: str) -> None:
    """A quotient is no code of a 16-bit state, and is rounded to one of its neighbours."""
    for name, values in left.items():
        tolerance = {"fp32": 1e-6, "u16": 2.0**-8, "bf16": 2.0**-7}[state]
        torch.testing.assert_close(values, right[name], rtol=tolerance, atol=1e-30)


def check_memory(folder: str, protects: str, state: str) -> None:
    section = {
        "ratio": 0.2,
        "refresh_interval": 2,
        "ema_decay": 0.5,
        "memory": "stage_max",
        "protects": protects,
        "state": state,
        **SELECTION,
    }
    config = ds_config(epi=section)

    def compared(engine: Any, past: dict[str, Tensor]) -> dict[str, Tensor]:
        if protects == "past":
            return past
        return {name: torch.maximum(past[name], now) for name, now in divided(full_importance(engine)).items()}

    with engine_of(OddNet, config) as engine, collected_logs() as messages:
        for step in range(2):
            train_step(engine, step, odd_batch)
        isolated = engine.epi.stats().isolated
        # Without a past there is nothing to protect, and nothing to warn of.
        assert (isolated == 0) == (protects == "past")
        assert not messages
        first_stage = full_importance(engine)
        refresh = engine.epi.finish_stage()
        assert refresh is not None
        assert refresh.isolated > 0
        kept = remembered(engine)
        assert_close(kept, divided(first_stage), state=state)
        for name, mask in expected_masks(compared(engine, kept), section).items():
            assert torch.equal(full_masks(engine)[name], mask), name
        for step in range(2, 6):
            train_step(engine, step, odd_batch)
        second_stage = full_importance(engine)
        larger = {name: torch.maximum(kept[name], divided(second_stage)[name]) for name in kept}
        assert any(not torch.equal(larger[name], kept[name]) for name in larger)
        for name, mask in expected_masks(compared(engine, kept), section).items():
            assert torch.equal(full_masks(engine)[name], mask), name
        assert engine.epi.stats().last_refresh.collectives <= 8
        engine.epi.finish_stage()
        assert_close(remembered(engine), larger, state=state)
        larger = remembered(engine)
        sizes = engine.epi.memory_report().state_bytes
        assert sizes[RELATIVE] == sizes["importance"] > 0
        engine.save_checkpoint(folder, "tag")
        masks = full_masks(engine)
    with engine_of(OddNet, config) as engine:
        engine.load_checkpoint(folder, "tag")
        assert_same(remembered(engine), larger)
        assert_same(full_importance(engine), second_stage)
        assert engine.epi.stats().counters.finished_stages == 2
        for name, mask in full_masks(engine).items():
            assert torch.equal(mask, masks[name])


@pytest.mark.parametrize(
    ("protects", "state", "world_size"), [("past", "fp32", 2), ("past_and_present", "u16", 3), ("past", "bf16", 1)]
)
def test_finished_stages_are_remembered(tmp_path: Path, protects: str, state: str, world_size: int) -> None:
    run_ranks(check_memory, world_size, str(tmp_path), protects, state)


def check_tasks(folder: str, changes: dict[str, Any]) -> None:
    """The mask on any number of ranks is the one that whole tensors in one process give, and so it is resumed."""
    section = {"ratio": 0.2, "refresh_interval": 2, "ema_decay": 0.5, "memory": "per_task", **changes}
    config = ds_config(epi=section)

    def check_mask(engine: Any, finished: dict[str, dict[str, Tensor]]) -> None:
        whole = WholeSelection({"layer": "block", **section}, present=full_importance(engine), finished=finished)
        for name, mask in whole.masks().items():
            assert torch.equal(full_masks(engine)[name], mask), name
        refresh = engine.epi.stats().last_refresh
        assert refresh.collectives <= 8
        assert refresh.tasks == (whole.shares() if whole.comparison.tasks is not None else ())
        for layer, found in zip(engine.epi.layers(), refresh.importance, strict=True):
            assert found.largest_in in layer.parameters

    finished: dict[str, dict[str, Tensor]] = {}
    with engine_of(OddNet, config) as engine:
        with pytest.raises(UserError, match=r"finish_stage\(name\)"):
            engine.epi.finish_stage()
        for index, stage in enumerate(("chat", "code")):
            for step in range(2 * index, 2 * index + 2):
                train_step(engine, step, odd_batch)
            check_mask(engine, finished)
            finished[stage] = full_importance(engine)
            refresh = engine.epi.finish_stage(stage)
            assert refresh is not None
            assert refresh.isolated > 0
            check_mask(engine, finished)
        sizes = engine.epi.memory_report().state_bytes
        assert sizes["task/chat"] == sizes["task/code"] == sizes["importance"] > 0
        engine.save_checkpoint(folder, "tag")
        for step in range(4, 6):
            train_step(engine, step, odd_batch)
        check_mask(engine, finished)
        assert [task.name for task in engine.epi.stats().last_refresh.tasks][:2] == ["chat", "code"]
        masks, weights = full_masks(engine), full_weights(engine)
    with engine_of(OddNet, config) as engine:
        # What the engine came to before it loads is forgotten.
        train_step(engine, 0, odd_batch)
        engine.epi.finish_stage("other")
        engine.load_checkpoint(folder, "tag")
        assert "task/other" not in engine.epi.memory_report().state_bytes
        for stage, importance in finished.items():
            assert_same(full_state(engine, f"task/{stage}"), importance)
        for step in range(4, 6):
            train_step(engine, step, odd_batch)
        for name, mask in full_masks(engine).items():
            assert torch.equal(mask, masks[name]), name
        assert_same(full_weights(engine), weights)


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        ({"selection": "raw_global"}, 1),
        ({"normalizer": "minmax", "apply": "update"}, 2),
        ({"normalizer": "mean", "protects": "past"}, 3),
        pytest.param({"selection": "per_layer"}, 2, marks=pytest.mark.slow),
        pytest.param({"normalizer": "mean"}, 4, marks=pytest.mark.slow),
    ],
)
def test_tasks_share_the_budget(tmp_path: Path, changes: dict[str, Any], world_size: int) -> None:
    run_ranks(check_tasks, world_size, str(tmp_path), changes)
