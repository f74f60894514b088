"""A step that plain ZeRO-3 skips leaves no trace, also when its NaN stands in an isolated entry only."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.support.covering import covering
from tests.support.engines import (
    PARTIAL_OFFLOAD,
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
from tests.support.nvme import WideNet, needs_libaio, nvme
from tests.support.ranks import run_ranks
from tests.support.tiers import values_first

pytestmark = pytest.mark.zero3

NAME = "blocks.1.weight"
INTERVAL = 3


def _snapshot(engine: Any) -> dict[str, Any]:
    return {
        "weights": full_weights(engine),
        "moments": full_moments(engine),
        "importance": full_importance(engine),
        "masks": full_masks(engine),
        "counters": engine.epi.stats().counters,
        "thresholds": engine.epi.thresholds(),
        "clipping": [average.to_dict() for average in engine.optimizer._epi_context.clipping],
    }


def _assert_same_state(left: dict[str, Any], right: dict[str, Any]) -> None:
    for key in ("weights", "moments", "importance", "masks"):
        assert_same(left[key], right[key])
    for key in ("counters", "thresholds", "clipping"):
        assert left[key] == right[key]


def check_skip(
    apply: str, value: float, isolated_only: bool, changes: dict[str, Any], model: Callable[[], nn.Module] = OddNet
) -> None:
    """Poison one entry of one rank's gradient in one micro-batch, then train on; compare with a run without it."""
    section = {"ratio": 0.2, "refresh_interval": INTERVAL, "ema_decay": 0.9, "apply": apply}
    config = ds_config(epi=section, accumulation=2, **changes)
    finals = []
    for poisoned in (True, False):
        with engine_of(model, config) as engine:
            for step in range(INTERVAL + 1):
                train_step(engine, step, odd_batch)
            if poisoned:
                before = _snapshot(engine)
                mask = before["masks"][NAME]
                assert 0 < int(mask.sum()) < mask.numel()
                index = tuple(torch.nonzero(mask if isolated_only else ~mask)[0].tolist())
                _poisoned_step(engine, index, value)
                assert engine.skipped_steps == 1
                assert not engine.was_step_applied()
                _assert_same_state(before, _snapshot(engine))
            for step in range(INTERVAL + 1, 2 * INTERVAL + 1):
                train_step(engine, step, odd_batch)
            finals.append(_snapshot(engine))
    _assert_same_state(*finals)


def _poisoned_step(engine: Any, index: tuple[int, ...], value: float) -> None:
    parameter = dict(engine.module.named_parameters())[NAME]
    calls = []

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 1 and dist.get_rank() == dist.get_world_size() - 1:
            gradient = gradient.clone()
            gradient[index] = value
        return gradient

    handle = parameter.register_hook(poison)
    train_step(engine, 999, odd_batch)
    handle.remove()
    assert len(calls) == engine.gradient_accumulation_steps()


def storm(folder: str, changes: dict[str, Any]) -> str:
    """Poison every step but one, until the run gives up; return what it says."""
    section = {"ratio": 0.2, "refresh_interval": INTERVAL, "max_skipped_steps": 3}
    with engine_of(OddNet, ds_config(epi=section, **changes)) as engine:
        train_step(engine, 0, odd_batch)
        engine.save_checkpoint(folder)
        before = full_weights(engine)
        # An applied step in between begins the count anew.
        for _ in range(2):
            _poisoned_step(engine, (0, 0), float("nan"))
        train_step(engine, 1, odd_batch)
        for _ in range(2):
            _poisoned_step(engine, (0, 0), float("nan"))
        with pytest.raises(RuntimeError) as raised:
            _poisoned_step(engine, (0, 0), float("nan"))
        assert not all(torch.equal(before[name], after) for name, after in full_weights(engine).items())
        assert all(weight.isfinite().all() for weight in full_weights(engine).values())
        return str(raised.value)


@pytest.mark.parametrize("offload", [False, True], ids=["device", "offload"])
def test_a_storm_of_nan_ends_the_run_with_a_diagnosis(tmp_path: Path, offload: bool) -> None:
    said = run_ranks(storm, 2, str(tmp_path), {"offload": offload})
    assert said[0] == said[1]
    assert "the last 3 steps were skipped (max_skipped_steps)" in said[0]
    assert f"those of 1 of 11 parameters ({NAME}), with loss scale 1." in said[0]
    assert f"The newest checkpoint is {tmp_path / 'global_step1'}" in said[0]


@pytest.mark.parametrize(("world_size", "isolated_only"), values_first(product([1, 2, 3, 4], [True, False])))
def test_a_nan_leaves_no_trace(world_size: int, isolated_only: bool) -> None:
    run_ranks(check_skip, world_size, "reduction", float("nan"), isolated_only, {})


@pytest.mark.parametrize(
    ("apply", "offload", "value"),
    values_first(covering(["reduction", "update"], [False, True], [float("nan"), float("inf")])),
)
def test_a_non_finite_isolated_entry_leaves_no_trace(apply: str, offload: bool, value: float) -> None:
    run_ranks(check_skip, 2, apply, value, True, {"offload": offload})


def test_a_non_finite_isolated_entry_leaves_no_trace_with_partial_offload() -> None:
    run_ranks(check_skip, 2, "reduction", float("inf"), True, PARTIAL_OFFLOAD)


@pytest.mark.slow
@needs_libaio
def test_a_non_finite_isolated_entry_leaves_no_trace_with_nvme(tmp_path: Path) -> None:
    run_ranks(check_skip, 2, "reduction", float("nan"), True, nvme(str(tmp_path)), WideNet)
