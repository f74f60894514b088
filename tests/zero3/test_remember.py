"""What must be kept is measured before the first step: the same at every number of ranks, and once in a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from epi_ds.errors import UserError
from epi_ds.isolation.importance.remembered import RELATIVE
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
from tests.zero3.test_masks import expected_masks

pytestmark = pytest.mark.zero3

# Micro-batches of a global batch, whatever the number of ranks; three such batches are measured.
MICRO_BATCHES, WINDOWS = 4, 3
SECTION: dict[str, Any] = {"ratio": 0.2, "refresh_interval": 2, "ema_decay": 0.5, "selection": "raw_global"}
KEPT = {**SECTION, "memory": "stage_max", "protects": "past"}


def kept_losses(engine: Any, *, more: int = 0) -> Iterator[Tensor]:
    """Yield this rank's losses of every global batch, and some of a batch that is not filled."""
    rank, accumulation = dist.get_rank(), engine.gradient_accumulation_steps()
    for window in range(WINDOWS):
        for index in range(accumulation):
            yield engine(*odd_batch(100 + window, 0, index * dist.get_world_size() + rank))
    for index in range(more):
        yield engine(*odd_batch(100 + WINDOWS, rank, index))


def config_of(section: dict[str, Any], *, offload: bool = False) -> dict[str, Any]:
    return ds_config(epi=section, offload=offload, accumulation=MICRO_BATCHES // dist.get_world_size())


def mean_squares() -> dict[str, Tensor]:
    """The mean squared gradient of the global batches, by one process that holds the whole model, in fp64."""
    torch.manual_seed(0)
    model = OddNet().double()
    found = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    for window in range(WINDOWS):
        model.zero_grad()
        for index in range(MICRO_BATCHES):
            tokens, target = odd_batch(100 + window, 0, index)
            (model(tokens, target.double()) / MICRO_BATCHES).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            found[name] += parameter.grad**2 / WINDOWS
    return found


def check_remember(folder: str, offload: bool) -> dict[str, Tensor]:
    """Measure, train a stage, and resume; return what is remembered of what is kept."""
    with engine_of(OddNet, config_of(KEPT, offload=offload)) as engine, collected_logs() as messages:
        before = full_weights(engine)
        refresh = engine.epi.remember("base", kept_losses(engine, more=int(dist.get_world_size() < MICRO_BATCHES)))
        assert_same(full_weights(engine), before)
        assert refresh is not None
        assert refresh.isolated > 0
        # However short the run is, its mask is in force.
        engine.epi.check_planned_steps(1)
        left_out = [text for text in messages if "left out the last 1 of" in text]
        assert bool(left_out) == (dist.get_rank() == 0 and dist.get_world_size() < MICRO_BATCHES)
        base = full_state(engine, RELATIVE)
        total = sum(float(values.double().sum()) for values in base.values())
        assert total / sum(values.numel() for values in base.values()) == pytest.approx(1.0, rel=1e-6)
        masks = expected_masks(base, KEPT)
        assert_same(full_masks(engine), masks)
        # The importance of the run begins anew.
        assert not any(values.any() for values in full_importance(engine).values())
        counters = engine.epi.stats().counters
        assert (counters.finished_stages, counters.importance_weight, counters.observations) == (1, 0.0, 0)
        for step in range(3):
            train_step(engine, step, odd_batch)
        assert engine.epi.stats().counters.importance_weight == 1 - 0.5**3
        assert_same(full_masks(engine), masks)
        held = {name: values[masks[name]] for name, values in full_weights(engine).items()}
        assert_same(held, {name: values[masks[name]] for name, values in before.items()})
        engine.save_checkpoint(folder, "tag")
        train_step(engine, 3, odd_batch)
        weights = full_weights(engine)
    with engine_of(OddNet, config_of(KEPT, offload=offload)) as engine:
        engine.load_checkpoint(folder, "tag")
        assert_same(full_state(engine, RELATIVE), base)
        train_step(engine, 3, odd_batch)
        assert_same(full_weights(engine), weights)
    return base


@pytest.mark.parametrize(
    ("offload", "worlds"),
    [(False, (1, 2, 4)), pytest.param(True, (2,), marks=pytest.mark.slow)],
    ids=["device", "offload"],
)
def test_importance_of_what_is_kept_does_not_depend_on_the_ranks(
    tmp_path: Path, offload: bool, worlds: tuple[int, ...]
) -> None:
    truth = mean_squares()
    mean = sum(float(v.sum()) for v in truth.values()) / sum(v.numel() for v in truth.values())
    for ranks in worlds:
        base = run_ranks(check_remember, ranks, str(tmp_path / str(ranks)), offload)[0]
        for name, values in base.items():
            # Gradients are fp32, and added in another order at every number of ranks.
            torch.testing.assert_close(values.double(), truth[name] / mean, rtol=1e-4, atol=1e-7)


def check_policies() -> None:
    """What is kept is remembered under every policy; static isolates it, none does not."""
    for policy in ("none", "static"):
        changes = {"refresh_interval": 500, "policy": policy}
        with engine_of(OddNet, config_of(KEPT | changes)) as engine:
            refresh = engine.epi.remember("base", kept_losses(engine))
            assert (refresh is None) == (policy == "none")
            base = full_state(engine, RELATIVE)
            masks = full_masks(engine)
            if policy == "static":
                assert_same(masks, expected_masks(base, KEPT))
            assert "importance" not in engine.epi.memory_report().state_bytes
            train_step(engine, 0, odd_batch)
            # Nothing is measured while it trains, so there is nothing to remember of a stage.
            assert engine.epi.finish_stage("one") is None
            assert_same(full_state(engine, RELATIVE), base)
            assert_same(full_masks(engine), masks)


def check_other_policies() -> None:
    """Policies that rank by something else remember too, for an anchor, and have the masks that they have without."""
    for memory in ("stage_max", "per_task"):
        kept = {"memory": memory, "protects": "past"}
        for section in ({"policy": "random", "ratio": 0.2}, {"policy": "half"}, {"policy": "momentum", "ratio": 0.8}):
            masks = []
            for own in (section, section | kept):
                with engine_of(OddNet, config_of(own)) as engine:
                    if own is not section:
                        engine.epi.remember("base", kept_losses(engine))
                        assert "importance" not in engine.epi.memory_report().state_bytes
                    for step in range(2):
                        train_step(engine, step, odd_batch)
                    assert engine.epi.stats().isolated > 0
                    masks.append(full_masks(engine))
            assert_same(*masks)


def check_tasks() -> None:
    section = KEPT | {"memory": "per_task", "protects": "past_and_present"}
    with engine_of(OddNet, config_of(section)) as engine:
        refresh = engine.epi.remember("base", kept_losses(engine))
        # Nothing is known of the task to come, so what is kept has the whole budget.
        assert refresh is not None
        assert refresh.isolated == pytest.approx(0.2 * engine.epi.stats().covered, abs=1)
        assert list(engine.epi.controller.states) == ["importance", "task/base"]
        for step in range(2):
            train_step(engine, step, odd_batch)
        refresh = engine.epi.finish_stage("new")
        assert refresh is not None
        assert [task.name for task in refresh.tasks] == ["base", "new", None]


def check_refusals() -> None:
    static = KEPT | {"policy": "static", "refresh_interval": 500}
    with (
        engine_of(OddNet, config_of(static)) as engine,
        pytest.raises(RuntimeError, match=r"static with memory has no mask yet.*epi\.remember"),
    ):
        train_step(engine, 0, odd_batch)
    with engine_of(OddNet, config_of(SECTION)) as engine, pytest.raises(UserError, match="remembers nothing; set mem"):
        engine.epi.remember("base", kept_losses(engine))
    with engine_of(OddNet, config_of(KEPT)) as engine:
        with pytest.raises(UserError, match="give it a name, such as base"):
            engine.epi.remember("", kept_losses(engine))
        with pytest.raises(UserError, match="was given 1 losses, and a global batch has 2 micro-batches"):
            engine.epi.remember("base", [engine(*odd_batch(0, dist.get_rank(), 0))])
        assert engine.epi.stats().counters.finished_stages == 0
        # A batch that was not filled leaves nothing behind.
        train_step(engine, 0, odd_batch)
        weights = full_weights(engine)
    with engine_of(OddNet, config_of(KEPT)) as engine:
        train_step(engine, 0, odd_batch)
        assert_same(full_weights(engine), weights)


def test_what_is_kept_is_remembered_under_every_policy_and_memory() -> None:
    run_ranks(check_policies, 2)
    run_ranks(check_other_policies, 2)
    run_ranks(check_tasks, 2)


def test_what_cannot_be_remembered_is_refused() -> None:
    run_ranks(check_refusals, 2)
