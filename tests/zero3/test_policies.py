"""Policies beside the paper's, on real engines: what they isolate at every number of ranks, and after a resume."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from epi_ds.choices import Normalizer, Selection
from epi_ds.errors import UserError
from epi_ds.isolation.layout import block_of
from tests.support.engines import (
    assert_same,
    ds_config,
    engine_of,
    full_importance,
    full_masks,
    full_moments,
    full_weights,
    train_step,
)
from tests.support.models import OddNet, odd_batch
from tests.support.nvme import WideNet, needs_libaio, nvme, on_host
from tests.support.oracle import oracle_masks
from tests.support.ranks import run_ranks
from tests.support.tiers import slow_but
from tests.zero3.test_masks import given_importance, restore
from tests.zero3.test_ratio_zero import compare
from tests.zero3.test_release import BOUND, LEARNING_RATE, Prescribed

pytestmark = pytest.mark.zero3

DRAWN: dict[str, dict[str, Any]] = {
    "random": {"policy": "random", "ratio": 0.3},
    "random, stage": {"policy": "random", "ratio": 0.3, "redraw": "stage", "selection": "per_layer"},
    "random, refresh": {"policy": "random", "ratio": 0.3, "redraw": "refresh", "refresh_interval": 2},
    "random, late": {"policy": "random", "ratio": 0.3, "warmup_steps": 2, "apply": "update"},
    "half": {"policy": "half"},
}
MEASURED: dict[str, dict[str, Any]] = {
    "inverted": {"policy": "inverted", "ratio": 0.3, "refresh_interval": 2, "ema_decay": 0.9},
    "first": {"policy": "first", "ratio": 0.3, "refresh_interval": 2, "ema_decay": 0.9},
    "momentum": {"policy": "momentum", "ratio": 0.8},
}
POLICIES = DRAWN | MEASURED


def drawn_masks(name: str, changes: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Return the masks before the first step and after each of four, the second of which ends a stage."""
    found = []
    with engine_of(OddNet, ds_config(epi=POLICIES[name], **changes)) as engine:
        assert "importance" not in engine.epi.memory_report().state_bytes
        found.append(full_masks(engine))
        for step in range(4):
            before, weights = found[-1], full_weights(engine)
            train_step(engine, step, odd_batch)
            if step == 1:
                engine.epi.finish_stage("a")
            for parameter, now in full_weights(engine).items():
                held = before[parameter]
                assert torch.equal(now[held], weights[parameter][held]), parameter
            found.append(full_masks(engine))
    return found


@lru_cache
def _reference(name: str) -> list[dict[str, Tensor]]:
    return run_ranks(drawn_masks, 1, name, {})[0]


@pytest.mark.parametrize(
    ("name", "world_size"),
    slow_but(
        [("random", 2), ("random, stage", 3), ("random, refresh", 4), ("random, late", 2), ("half", 3)],
        ("random, refresh", 4),
        ("half", 3),
    ),
)
def test_draws_do_not_depend_on_the_number_of_ranks(name: str, world_size: int) -> None:
    for masks in run_ranks(drawn_masks, world_size, name, {}):
        for one, other in zip(masks, _reference(name), strict=True):
            assert_same(one, other)


@pytest.mark.slow
def test_draws_do_not_depend_on_the_placement() -> None:
    changes = {"offload": True, "zero_optimization": {"sub_group_size": 30}}
    for one, other in zip(run_ranks(drawn_masks, 2, "half", changes)[0], _reference("half"), strict=True):
        assert_same(one, other)


def _changes(name: str) -> list[bool]:
    """Return after which of the four steps the mask was another one."""
    masks = _reference(name)
    return [any(not now[n].equal(before[n]) for n in now) for before, now in pairwise(masks)]


def test_when_masks_are_drawn_and_how_many_they_hold() -> None:
    numel = {name: parameter.numel() for name, parameter in OddNet().named_parameters()}
    total = sum(numel.values())
    assert _changes("random") == [False, False, False, False]
    assert _changes("random, stage") == [False, True, False, False]
    assert _changes("random, refresh") == [False, True, False, True]
    assert _changes("random, late") == [False, True, False, False]
    assert _changes("half") in ([False, True, False, False], [False, False, False, False])
    for masks in _reference("random, refresh"):
        # Of 2^31 ranks no two of so few entries are the same.
        assert sum(int(mask.sum()) for mask in masks.values()) == int(0.3 * total)
    by_layer: dict[str, list[int]] = {}
    for name, mask in _reference("random, stage")[0].items():
        counts = by_layer.setdefault(block_of(name), [0, 0])
        counts[0], counts[1] = counts[0] + int(mask.sum()), counts[1] + numel[name]
    assert all(isolated == int(0.3 * whole) for isolated, whole in by_layer.values())
    for masks in _reference("half"):
        still = {name for name, mask in masks.items() if mask.any()}
        assert still in ({"blocks.0.weight", "blocks.0.bias"}, {"blocks.1.weight", "blocks.1.bias"})
        assert all(bool(masks[name].all()) for name in still)


def _mirrored(values: np.ndarray) -> np.ndarray:
    patterns = values.astype(np.float32).view(np.int32)
    return np.where(patterns > 0, 0x7F800000 - patterns, 0).astype(np.int32).view(np.float32)


def least_important(section: dict[str, Any]) -> dict[str, Tensor]:
    """Ask the oracle for the most important of what is upside down; normalised by layer first, where asked for."""
    given = given_importance()
    layers: dict[str, list[str]] = {}
    for name in given:
        layers.setdefault(block_of(name), []).append(name)
    arrays = [torch.cat([given[n].flatten() for n in names]).numpy() for names in layers.values()]
    selection = Selection(section["selection"])
    if selection is Selection.NORMALIZED_GLOBAL:
        wide = [values.astype(np.float64) for values in arrays]
        lows = [values.min() if section["normalizer"] == "minmax" else 0.0 for values in wide]
        scales = [
            values.max() - low if section["normalizer"] == "minmax" else values.mean()
            for values, low in zip(wide, lows, strict=True)
        ]
        scores = [(values - low) / scale for values, low, scale in zip(wide, lows, scales, strict=True)]
        arrays, selection = [values * 2.0**80 for values in scores], Selection.RAW_GLOBAL
    ranks = [_mirrored(values) for values in arrays]
    masks = oracle_masks(ranks, ratio=str(section["ratio"]), selection=selection, normalizer=Normalizer.MINMAX)
    found = {}
    for names, mask in zip(layers.values(), masks, strict=True):
        parts = np.split(mask, np.cumsum([given[n].numel() for n in names])[:-1])
        for name, part in zip(names, parts, strict=True):
            found[name] = torch.from_numpy(part.copy()).view(given[name].shape)
    return found


SELECTIONS: list[dict[str, Any]] = [
    {"selection": "normalized_global", "normalizer": "minmax"},
    {"selection": "normalized_global", "normalizer": "mean"},
    {"selection": "raw_global"},
    {"selection": "per_layer"},
]


PLACED = list(zip(SELECTIONS, [4, 3, 2, 1], strict=True))


def check_inverted(selection: dict[str, Any]) -> None:
    section = {"policy": "inverted", "ratio": 0.3, **selection}
    given = given_importance()
    with engine_of(OddNet, ds_config(epi=section)) as engine:
        restore(engine, given)
        refresh = engine.epi.refresh_now()
        masks = full_masks(engine)
    assert_same(masks, least_important(section))
    assert 0 < refresh.isolated <= refresh.budget < refresh.isolated + refresh.tied_mass
    assert refresh.collectives <= 8
    for name, mask in masks.items():
        assert not mask[given[name] == 0].any()
        if selection["selection"] == "raw_global" and mask.any() and not mask.all():
            assert given[name][mask].max() < given[name][~mask & (given[name] > 0)].min()


@pytest.mark.parametrize(("selection", "world_size"), slow_but(PLACED, PLACED[0], PLACED[3]))
def test_inverted_isolates_the_least_important(selection: dict[str, Any], world_size: int) -> None:
    run_ranks(check_inverted, world_size, selection)


def check_first() -> None:
    """The first mask is that of ``evolving``, and stays; what measured it is freed."""
    section = {"ratio": 0.3, "refresh_interval": 2, "ema_decay": 0.9}
    with engine_of(OddNet, ds_config(epi=section)) as engine:
        for step in range(2):
            train_step(engine, step, odd_batch)
        expected = full_masks(engine)
    with engine_of(OddNet, ds_config(epi=MEASURED["first"])) as engine:
        with pytest.raises(UserError, match="policy: first selects one mask"):
            engine.epi.refresh_now()
        with pytest.raises(UserError, match="policy: first does not select by a probe"):
            engine.epi.probe([])
        for step in range(2):
            assert "importance" in engine.epi.memory_report().state_bytes
            train_step(engine, step, odd_batch)
        weights = full_weights(engine)
        for step in range(2, 7):
            train_step(engine, step, odd_batch)
        assert engine.epi.finish_stage("a") is None
        assert_same(full_masks(engine), expected)
        for name, now in full_weights(engine).items():
            assert torch.equal(now[expected[name]], weights[name][expected[name]])
        assert "importance" not in engine.epi.memory_report().state_bytes
        assert engine.epi.stats().counters.refreshes == 1


@pytest.mark.parametrize("world_size", slow_but([1, 3], 3))
def test_first_keeps_its_mask_and_frees_what_measured_it(world_size: int) -> None:
    run_ranks(check_first, world_size)


def check_momentum(changes: dict[str, Any]) -> None:
    """In every tensor what stands still has a smaller momentum after the last step than what moves in the next one."""
    with engine_of(OddNet, ds_config(epi=MEASURED["momentum"], **changes)) as engine:
        assert not any(mask.any() for mask in full_masks(engine).values())
        for step in range(3):
            before, weights = full_masks(engine), full_weights(engine)
            train_step(engine, step, odd_batch)
            for name, now in full_weights(engine).items():
                assert torch.equal(now[before[name]], weights[name][before[name]]), name
            momenta, masks = full_moments(engine), full_masks(engine)
            for name, mask in masks.items():
                size = momenta[f"{name}/exp_avg"].abs()
                budget = int(0.8 * size.numel())
                isolated = int(mask.sum())
                assert isolated <= budget
                if isolated:
                    assert size[mask].max() < size[~mask].min()
                # Equal ones, in the embedding those without a gradient, are isolated together or not at all.
                smallest = size.flatten().sort().values
                assert isolated == budget or smallest[isolated] == smallest[budget]
            assert any(mask.any() for mask in masks.values())
            # What a user sees as importance is what is ranked by.
            for name, seen in full_importance(engine).items():
                assert torch.equal(seen, momenta[f"{name}/exp_avg"].abs())


@pytest.mark.parametrize(
    ("world_size", "offload"), slow_but([(1, True), (2, True), (3, False), (4, False)], (3, False))
)
def test_momentum_moves_the_largest_momenta_of_every_tensor(world_size: int, offload: bool) -> None:
    run_ranks(check_momentum, world_size, {"offload": offload})


def check_refused() -> None:
    """What cannot work is refused by name before the engine is changed."""
    refused = [
        ({"policy": "half", "include": ["embed"]}, {}, "none of the 1 covered parameters do"),
        (MEASURED["momentum"], {"optimizer": lambda m: torch.optim.SGD(m.parameters(), lr=0.1)}, "momenta .* SGD"),
    ]
    for section, options, message in refused:
        with (
            pytest.raises(UserError, match=message),
            engine_of(OddNet, ds_config(epi=section, zero_allow_untested_optimizer=True), **options),
        ):
            pass


def test_what_cannot_work_is_refused() -> None:
    run_ranks(check_refused, 1)


def check_resume(folder: str, name: str) -> None:
    """A run that is cut after the mask of step 3 ends as the one that was not."""
    config = ds_config(epi=POLICIES[name])

    def train(engine: Any, first: int) -> None:
        for step in range(first, 6):
            train_step(engine, step, odd_batch)
            if step == 4:
                engine.epi.finish_stage("a")

    def final(engine: Any) -> tuple[dict[str, Tensor], Any]:
        return full_weights(engine) | full_moments(engine) | full_masks(engine), engine.epi.stats().counters

    with engine_of(OddNet, config) as engine:
        for step in range(3):
            train_step(engine, step, odd_batch)
        engine.save_checkpoint(folder)
        train(engine, 3)
        expected, counters = final(engine)
    with engine_of(OddNet, config) as engine:
        engine.load_checkpoint(folder)
        # The mask that an engine begins with is not the run's.
        assert engine.epi.stats().last_refresh is None
        train(engine, 3)
        resumed, resumed_counters = final(engine)
    assert_same(resumed, expected)
    assert resumed_counters == counters


RESUMED = [
    ("random, refresh", 2),
    ("first", 1),
    ("momentum", 3),
    ("inverted", 1),
    ("half", 2),
    ("random", 1),
    ("random, stage", 1),
    ("random, late", 1),
]


@pytest.mark.parametrize(("name", "world_size"), slow_but(RESUMED, *RESUMED[:2]))
def test_resume_is_bit_exact(tmp_path: Path, name: str, world_size: int) -> None:
    run_ranks(check_resume, world_size, str(tmp_path), name)


def save_masks(folder: str, name: str) -> dict[str, Tensor]:
    with engine_of(OddNet, ds_config(epi=POLICIES[name])) as engine:
        for step in range(3):
            train_step(engine, step, odd_batch)
        engine.save_checkpoint(folder)
        return full_masks(engine)


def load_masks(folder: str, name: str) -> list[dict[str, Tensor]]:
    """Return the masks as they were saved, and, where they are drawn, those of the next draws."""
    found = []
    section = POLICIES[name] | {"checkpoint": {"allow_new_batch_size": True}}
    with engine_of(OddNet, ds_config(epi=section)) as engine:
        engine.load_checkpoint(folder)
        found.append(full_masks(engine))
        train_step(engine, 3, odd_batch)
        if name in DRAWN:
            found.append(full_masks(engine))
            engine.epi.finish_stage("a")
            found.append(full_masks(engine))
    return found


@pytest.mark.parametrize("name", slow_but(["random, refresh", "half", *MEASURED], "random, refresh"))
def test_other_numbers_of_ranks_continue_with_the_same_masks(tmp_path: Path, name: str) -> None:
    (saved, _) = run_ranks(save_masks, 2, str(tmp_path), name)
    three, one = run_ranks(load_masks, 3, str(tmp_path), name)[0], run_ranks(load_masks, 1, str(tmp_path), name)[0]
    assert_same(three[0], saved)
    for left, right in zip(three, one, strict=True):
        assert_same(left, right)


@pytest.mark.parametrize("name", slow_but(["random, refresh", "half", *MEASURED], "momentum"))
def test_ratio_zero_is_plain_zero3(name: str) -> None:
    run_ranks(compare_at_zero, 2, name)


def compare_at_zero(name: str) -> None:
    compare("update", {}, section=POLICIES[name] | {"ratio": 0.0})


def measure_release(policy: dict[str, Any], apply: str, factor: float) -> float:
    """Return how far entries released by the second draw move, relative to those that were never held; RMS, 10 steps.

    The gradients of what is held become ``factor`` times as large meanwhile, and stay so.
    """
    config = ds_config(epi=policy | {"apply": apply, "exclude": ["ballast"]}, gradient_clipping=1.0)
    config["optimizer"]["params"] |= {"lr": LEARNING_RATE, "weight_decay": 0.0, "betas": [0.9, 0.99]}
    with engine_of(Prescribed, config) as engine:
        before = full_masks(engine)
        held = torch.stack([before[name] for name in engine.epi.parameter_names])

        def train(first: int, last: int) -> None:
            for step in range(first, last):
                generator = torch.Generator().manual_seed(step)
                rows = torch.randn(held.shape, generator=generator)
                rows[held] *= factor if step >= 20 else 1.0
                engine.backward(engine(rows, torch.zeros(held.shape[1])))
                engine.step()

        train(0, 60)
        engine.epi.finish_stage("a")
        now, weights = full_masks(engine), full_weights(engine)
        moved = {kind: [] for kind in ("released", "plastic")}
        for step in range(60, 70):
            train(step, step + 1)
            after = full_weights(engine)
            for name, mask in before.items():
                update = (after[name] - weights[name]).square()
                moved["released"].append(update[mask & ~now[name]])
                moved["plastic"].append(update[~mask & ~now[name]])
            weights = after
    released, plastic = (float(torch.cat(parts).mean().sqrt()) for parts in moved.values())
    return released / plastic


@pytest.mark.slow
@pytest.mark.parametrize("apply", ["reduction", "update"])
@pytest.mark.parametrize("factor", [0.3, 10.0])
@pytest.mark.parametrize("name", ["random, stage", "half"])
def test_entries_released_by_a_draw_do_not_jump(name: str, apply: str, factor: float) -> None:
    """Nothing measures what is held; the optimizer's second moment goes on, and is what a release begins with."""
    ratio = run_ranks(measure_release, 1, POLICIES[name], apply, factor)[0]
    assert ratio <= BOUND


def check_nvme(folder: str, name: str) -> None:
    """A mask that is drawn before the first step, and another one at a stage's end: on a disk as in memory."""
    states = []
    for changes in (nvme(folder), on_host()):
        with engine_of(WideNet, ds_config(epi=POLICIES[name], **changes)) as engine:
            for step in range(4):
                train_step(engine, step, odd_batch)
                if step == 1:
                    engine.epi.finish_stage("a")
            states.append((full_masks(engine), full_weights(engine), full_moments(engine)))
    for one, other in zip(*states, strict=True):
        assert_same(one, other)


@pytest.mark.slow
@needs_libaio
@pytest.mark.parametrize("name", ["random, stage", "half"])
def test_draws_with_nvme_are_those_with_cpu_offload(tmp_path: Path, name: str) -> None:
    run_ranks(check_nvme, 2, str(tmp_path), name)
