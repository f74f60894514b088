"""The proof of value: isolation with ratio 0 is plain ZeRO-3, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.covering import covering
from tests.support.engines import (
    PARTIAL_OFFLOAD,
    assert_same,
    ds_config,
    engine_of,
    full_moments,
    full_weights,
    train_step,
)
from tests.support.models import OddNet, odd_batch
from tests.support.ranks import run_ranks
from tests.support.tiers import values_first

pytestmark = pytest.mark.zero3


def _run(model: Callable[[], nn.Module], config: dict[str, Any]) -> dict[str, Any]:
    with engine_of(model, config) as engine:
        losses = [loss for step in range(5) for loss in train_step(engine, step, odd_batch)]
        return {
            "losses": torch.stack(losses),
            "weights": full_weights(engine),
            "moments": full_moments(engine),
            "norm": float(engine.get_global_grad_norm()),
            "counters": (
                engine.global_steps,
                engine.global_samples,
                engine.skipped_steps,
                engine.micro_steps,
            ),
        }


def compare(
    apply: str,
    changes: dict[str, Any],
    model: Callable[[], nn.Module] = OddNet,
    section: dict[str, Any] | None = None,
) -> None:
    section = section or {"ratio": 0.0, "refresh_interval": 2, "apply": apply}
    plain = _run(model, ds_config(accumulation=2, **changes))
    isolated = _run(model, ds_config(accumulation=2, epi=section, **changes))
    assert torch.equal(plain["losses"], isolated["losses"])
    assert_same(plain["weights"], isolated["weights"])
    assert_same(plain["moments"], isolated["moments"])
    assert plain["norm"] == isolated["norm"]
    assert plain["counters"] == isolated["counters"]


@pytest.mark.parametrize(
    ("world_size", "offload", "apply"), values_first(covering([1, 2, 3, 4], [False, True], ["reduction", "update"]))
)
def test_ratio_zero_is_plain_zero3(world_size: int, offload: bool, apply: str) -> None:
    run_ranks(compare, world_size, apply, {"offload": offload})


def test_ratio_zero_is_plain_zero3_in_bf16() -> None:
    # fp16 needs an accelerator: DeepSpeed refuses it on the CPU. The loss scale is tested in test_importance.py.
    run_ranks(compare, 2, "reduction", {"bf16": {"enabled": True}})


def test_ratio_zero_is_plain_zero3_with_partial_offload() -> None:
    run_ranks(compare, 2, "reduction", PARTIAL_OFFLOAD)
