"""Placements whose run must be, bit for bit, that of a simpler one: NVMe offload and hierarchical partitioning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
from tests.support.ranks import end_ranks, run_ranks
from tests.zero3.test_resume import STOP, check_resume

pytestmark = pytest.mark.zero3

INTERVAL = 2


def _train(model: Callable[[], nn.Module], config: dict[str, Any], check: Callable[[Any], None]) -> dict[str, Any]:
    """Train three windows and one step; return the state after each window and what every step's norm was.

    In the second and third window isolated entries must keep their bits.
    """
    norms, states = [], []
    with engine_of(model, config) as engine:
        isolating = "epi" in config
        masks: dict[str, Tensor] = {}
        for step in range(3 * INTERVAL + 1):
            before = full_weights(engine)
            train_step(engine, step, odd_batch)
            norms.append(float(engine.get_global_grad_norm()))
            after = full_weights(engine)
            for name, mask in masks.items():
                assert torch.equal(before[name].view(torch.int32)[mask], after[name].view(torch.int32)[mask]), name
            if (step + 1) % INTERVAL == 0:
                masks = full_masks(engine) if isolating else {}
                states.append(
                    {
                        "weights": after,
                        "moments": full_moments(engine),
                        "importance": full_importance(engine) if isolating else {},
                        "masks": masks,
                    }
                )
        check(engine)
    return {"norms": norms, "states": states}


def _assert_isolates(run: dict[str, Any]) -> None:
    for state in run["states"]:
        assert sum(int(mask.sum()) for mask in state["masks"].values()) > 0


def _assert_same_run(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left["norms"] == right["norms"]
    for ours, theirs in zip(left["states"], right["states"], strict=True):
        for key in ("weights", "moments", "importance", "masks"):
            assert_same(ours[key], theirs[key])


def _section(apply: str, ratio: float) -> dict[str, Any]:
    # Per layer, so that every tensor has isolated entries, whatever its scale.
    section = {"ratio": ratio, "refresh_interval": INTERVAL, "ema_decay": 0.9, "apply": apply}
    return section | {"selection": "per_layer", "layer": "tensor"}


def swaps_one_sub_group(engine: Any) -> None:
    optimizer = engine.optimizer
    swapped = [optimizer._swappable_optimizer_subgroup(index) for index in range(len(optimizer.fp16_groups))]
    assert swapped.count(True) == 1
    assert len(swapped) > 2


def check_nvme(folder: str, apply: str, options: dict[str, Any]) -> None:
    """Hold and equality with CPU offload; with ratio 0, equality with plain ZeRO-3 in the same placement."""
    placement = nvme(folder, **options)
    isolated = _train(
        WideNet, ds_config(epi=_section(apply, 0.2), accumulation=4, **placement), check=swaps_one_sub_group
    )
    on_the_host = _train(
        WideNet, ds_config(epi=_section(apply, 0.2), accumulation=4, **on_host()), check=lambda _: None
    )
    _assert_isolates(isolated)
    _assert_same_run(isolated, on_the_host)


def check_nvme_ratio_zero(folder: str) -> None:
    runs = [
        _train(WideNet, ds_config(epi=epi, accumulation=2, **nvme(folder)), check=swaps_one_sub_group)
        for epi in (None, _section("reduction", 0.0))
    ]
    for state in runs[1]["states"]:
        state["importance"] = state["masks"] = {}
    _assert_same_run(*runs)


@needs_libaio
@pytest.mark.parametrize(
    ("apply", "options"),
    [
        ("reduction", {}),
        ("update", {"parameters": "cpu"}),
        ("reduction", {"pipeline": True}),
        ("reduction", {"parameters": "nvme"}),
    ],
    ids=["optimizer", "optimizer-update-parameters-on-cpu", "pipelined-optimizer", "optimizer-and-parameters"],
)
def test_a_run_with_nvme_is_the_run_with_cpu_offload(tmp_path: Path, apply: str, options: dict[str, Any]) -> None:
    run_ranks(check_nvme, 2, str(tmp_path), apply, options)


@needs_libaio
def test_ratio_zero_is_plain_zero3_with_nvme(tmp_path: Path) -> None:
    run_ranks(check_nvme_ratio_zero, 2, str(tmp_path))


# Weights are let go of after the forward of their layer, so that the backward has to gather them again.
RELEASED = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}


def keeps_copies(engine: Any) -> None:
    """After a forward, a rank of two holds half of every weight, beside its partition of a quarter."""
    engine(*odd_batch(0, 0, 0))
    for name, parameter in engine.module.named_parameters():
        assert parameter.ds_secondary_tensor.numel() == 2 * parameter.ds_tensor.ds_numel, name


def check_secondary_partitions(folder: str) -> None:
    """Four ranks in two groups, within which the backward gathers weights."""
    configs = [
        ds_config(epi=_section(apply, 0.2), accumulation=4, zero_optimization=RELEASED)
        for apply in ("reduction", "update")
    ]
    # First: the groups stay for as long as the process lives.
    without = [_train(OddNet, config, check=lambda _: None) for config in configs]
    for config, alone in zip(configs, without, strict=True):
        config["zero_optimization"]["zero_hpz_partition_size"] = 2
        _assert_isolates(alone)
        _assert_same_run(alone, _train(OddNet, config, check=keeps_copies))
    check_resume(folder, "reduction", False, STOP, RELEASED | {"zero_hpz_partition_size": 2})


def test_a_run_with_secondary_partitions_is_the_run_without(tmp_path: Path) -> None:
    try:
        run_ranks(check_secondary_partitions, 4, str(tmp_path))
    finally:
        end_ranks(4)
