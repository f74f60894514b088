"""Where the optimizer's states and the weights live: NVMe offload, partial offload, hierarchical partitioning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import Init
from torch import Tensor, nn

from epi_ds.inspect.audit import audit
from tests.support.engines import (
    PARTIAL_OFFLOAD,
    assert_same,
    collected_logs,
    ds_config,
    engine_of,
    full_importance,
    full_masks,
    full_moments,
    full_weights,
    train_step,
)
from tests.support.models import EvenNet, OddNet, head_batch, odd_batch
from tests.support.nvme import WideHeads, WideNet, needs_libaio, nvme, on_host
from tests.support.quantizer import two_nodes_of_two
from tests.support.ranks import end_ranks, run_ranks
from tests.zero3.test_anchor import check_oracle
from tests.zero3.test_hold import check_hold
from tests.zero3.test_importance import check_recorded, gather, record
from tests.zero3.test_ratio_zero import compare
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


def check_nvme(
    folder: str, apply: str, options: dict[str, Any], changes: dict[str, Any], anchor: dict[str, Any] | None = None
) -> None:
    """Hold, and equality with CPU offload."""
    section = _section(apply, 0.2)
    if anchor is not None:
        section |= {"anchor": anchor}
    swapped = ds_config(epi=section, accumulation=4, **nvme(folder, **options), **changes)
    isolated = _train(WideNet, swapped, check=swaps_one_sub_group)
    _assert_isolates(isolated)
    in_memory = ds_config(epi=section, accumulation=4, **on_host(), **changes)
    _assert_same_run(isolated, _train(WideNet, in_memory, check=lambda _: None))


def check_nvme_ratio_zero(folder: str) -> None:
    runs = [
        _train(WideNet, ds_config(epi=epi, accumulation=2, **nvme(folder)), check=swaps_one_sub_group)
        for epi in (None, _section("reduction", 0.0))
    ]
    for state in runs[1]["states"]:
        state["importance"] = state["masks"] = {}
    _assert_same_run(*runs)


@pytest.mark.slow
@needs_libaio
@pytest.mark.parametrize(
    ("apply", "options", "changes"),
    [
        ("reduction", {}, {}),
        ("update", {"parameters": "cpu"}, {"bf16": {"enabled": True}}),
        ("reduction", {"pipeline": True}, {}),
        ("reduction", {"parameters": "nvme"}, {}),
    ],
    ids=["optimizer", "optimizer-bf16-parameters-on-cpu", "pipelined-optimizer", "optimizer-and-parameters"],
)
def test_a_run_with_nvme_is_the_run_with_cpu_offload(
    tmp_path: Path, apply: str, options: dict[str, Any], changes: dict[str, Any]
) -> None:
    run_ranks(check_nvme, 2, str(tmp_path), apply, options, changes)


@pytest.mark.slow
@needs_libaio
@pytest.mark.parametrize("pull", ["update", "gradient"])
def test_an_anchor_pulls_what_lies_on_nvme(tmp_path: Path, pull: str) -> None:
    run_ranks(check_nvme, 2, str(tmp_path), "reduction", {"parameters": "nvme"}, {}, {"decay": 20.0, "pull": pull})


def _state(engine: Any) -> dict[str, Any]:
    return {
        "state": full_weights(engine) | full_moments(engine),
        "importance": full_importance(engine),
        "masks": full_masks(engine),
        "counters": engine.epi.stats().counters,
    }


def save_nvme(folder: str, options: dict[str, Any]) -> None:
    """Save after 4 and again, also under the same tag, after 5 of 7 steps; keep the state at the end in a file."""
    config = ds_config(epi=_section("reduction", 0.2), accumulation=2, **nvme(f"{folder}/first", **options))
    # Swapped files are named by a count of the process's parameters: as in a new process, which resumes.
    Init.param_id = 0
    with engine_of(WideNet, config) as engine:
        for step in range(7):
            train_step(engine, step, odd_batch)
            if step == 3:
                engine.save_checkpoint(folder, tag="before")
            if step in (3, 4):
                engine.save_checkpoint(folder, tag="again")
        torch.save(_state(engine), f"{folder}/expected_{dist.get_rank()}.pt")
    with engine_of(WideNet, config) as engine:
        weights = full_weights(engine)
        with pytest.raises(RuntimeError, match="resume in a process that makes its engine as the first one did"):
            engine.load_checkpoint(folder)
        with pytest.raises(RuntimeError, match="loads no weights without optimizer states"):
            engine.load_checkpoint(folder, load_module_only=True)
        assert_same(weights, full_weights(engine))


def resume_nvme(folder: str, options: dict[str, Any]) -> None:
    expected = torch.load(f"{folder}/expected_{dist.get_rank()}.pt", weights_only=False)
    config = ds_config(epi=_section("reduction", 0.2), accumulation=2, **nvme(f"{folder}/second", **options))
    with engine_of(WideNet, config) as engine:
        engine.load_checkpoint(folder)
        for step in range(5, 7):
            train_step(engine, step, odd_batch)
        resumed = _state(engine)
    for part in ("state", "importance", "masks"):
        assert_same(expected[part], resumed[part])
    assert expected["counters"] == resumed["counters"]


@pytest.mark.slow
@needs_libaio
def test_resume_with_nvme_is_bit_exact(tmp_path: Path) -> None:
    """Plain DeepSpeed's is not: it restores no moments, and gives small sub-groups the weights of the fresh model."""
    options = {"parameters": "nvme", "pipeline": True}
    run_ranks(save_nvme, 2, str(tmp_path), options)
    report = audit([tmp_path])
    assert report.isolated + report.plastic == sum(parameter.numel() for parameter in WideNet().parameters())
    assert report.isolated_moved == 0
    # Embeddings of tokens that a step does not have only decay; some of them are too small to.
    assert report.plastic_moved > 0.9 * report.plastic
    end_ranks(2)
    run_ranks(resume_nvme, 2, str(tmp_path), options)


@needs_libaio
def test_ratio_zero_is_plain_zero3_with_nvme(tmp_path: Path) -> None:
    run_ranks(check_nvme_ratio_zero, 2, str(tmp_path))


def probe_and_train(changes: dict[str, Any]) -> dict[str, Tensor]:
    """Probe one head, train the other one for a step, begin the moments anew; return weights, and masks as numbers.

    One step only: of a head that a window does not use, plain ZeRO-3 with NVMe applies whatever its buffer held.
    """
    section = {"policy": "static", "probe_steps": 2, "ratio": 0.2, "selection": "per_layer", "layer": "tensor"}
    with engine_of(WideHeads, ds_config(epi=section, gradient_clipping=0.0, **changes)) as engine:
        before = full_weights(engine)
        engine.epi.probe(engine(head_batch(index, dist.get_rank(), 0)[0], 0) for index in range(2))
        masks = full_masks(engine)
        assert masks["heads.0.weight"].any()
        assert not masks["heads.1.weight"].any()
        train_step(engine, 0, lambda step, rank, micro_batch: (head_batch(step, rank, micro_batch)[0], 1))
        after, plastic = full_weights(engine), ~masks["heads.0.weight"]
        # By weight decay, and not by the gradient of the probe.
        decayed = before["heads.0.weight"][plastic] * (1 - 1e-2 * 0.1)
        torch.testing.assert_close(after["heads.0.weight"][plastic], decayed)
        assert full_moments(engine)["heads.1.weight/exp_avg"].all()
        engine.epi.reset_optimizer_state()
        assert not any(values.any() for values in full_moments(engine).values())
    return after | {f"{name}/mask": mask.float() for name, mask in masks.items()}


def check_probe_with_nvme(folder: str) -> None:
    changes = [nvme(folder), on_host()]
    for change in changes:
        change["zero_optimization"]["sub_group_size"] = 1
    assert_same(*(probe_and_train(change) for change in changes))


@pytest.mark.slow
@needs_libaio
def test_probes_and_new_moments_are_the_same_with_nvme(tmp_path: Path) -> None:
    run_ranks(check_probe_with_nvme, 2, str(tmp_path))


# --- partial offload ---


def has_two_optimizers(engine: Any) -> None:
    optimizer = engine.optimizer
    assert len(optimizer.backup_optimizer.state) >= 1
    assert len(optimizer.optimizer.state) >= 1
    assert len(optimizer.backup_optimizer.state) + len(optimizer.optimizer.state) == len(optimizer.fp16_groups)


def check_partial_offload(folder: str) -> str:
    """Moments of both optimizers begin anew together; a load restores isolation whole. Return what the save said."""
    config = ds_config(epi=_section("reduction", 0.2), **PARTIAL_OFFLOAD)
    with engine_of(OddNet, config) as engine:
        for step in range(3):
            train_step(engine, step, odd_batch)
        has_two_optimizers(engine)
        assert all(values.any() for values in full_moments(engine).values())
        engine.epi.reset_optimizer_state()
        assert not any(values.any() for values in full_moments(engine).values())
        for step in range(3, 5):
            train_step(engine, step, odd_batch)
        with collected_logs() as messages:
            engine.save_checkpoint(folder)
        before = _state(engine)
    with engine_of(OddNet, config) as engine:
        engine.load_checkpoint(folder)
        # Not through the moments: those on the accelerator are in no checkpoint of DeepSpeed's.
        assert_same(before["importance"], full_importance(engine))
        assert_same(before["masks"], full_masks(engine))
        assert engine.epi.stats().counters == before["counters"]
        weights = full_weights(engine)
        assert_same({name: before["state"][name] for name in weights}, weights)
        train_step(engine, 5, odd_batch)
        has_two_optimizers(engine)
        for name, values in full_weights(engine).items():
            mask = before["masks"][name]
            assert torch.equal(values[mask], weights[name][mask]), name
    return " ".join(messages)


def test_partial_offload_resets_both_optimizers_and_resumes_isolation(tmp_path: Path) -> None:
    first, second = run_ranks(check_partial_offload, 2, str(tmp_path))
    assert "DeepSpeed saves no moments of the sub-groups that partial offload" in first
    assert "DeepSpeed saves no moments" not in second


# --- quantized gradients ---


def first_gradient(changes: dict[str, Any]) -> dict[str, Tensor]:
    with engine_of(EvenNet, ds_config(**changes)) as engine:
        optimizer = record(engine)
        train_step(engine, 0, odd_batch)
        return gather(engine, optimizer.recorded)


def check_quantized_gradients() -> None:
    exact = first_gradient({})
    quantized = {"zero_optimization": {"zero_quantized_gradients": True}}
    with two_nodes_of_two() as quantizer:
        for name, gradient in first_gradient(quantized).items():
            error = float((gradient - exact[name]).norm() / exact[name].norm())
            # Vectors, and what does not divide, are not quantized. Of the others a code is wrong by at most half of a
            # seventh of its group's maximum, twice.
            divides = gradient.dim() > 1 and gradient.numel() % 8 == 0
            assert (1e-3 < error < 0.2) if divides else error < 1e-5, f"{name}: {error}"
        assert quantizer.calls == 4
        for apply in ("reduction", "update"):
            assert check_hold(apply, quantized, EvenNet) > 0
            check_recorded(EvenNet, odd_batch, apply, quantized)
        compare("reduction", quantized, EvenNet)
        for pull in ("update", "gradient"):
            check_oracle(pull, quantized, 1, EvenNet)


@pytest.mark.slow
def test_isolation_works_on_quantized_gradients() -> None:
    run_ranks(check_quantized_gradients, 4)


# --- hierarchical partitioning ---

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
    grouped = RELEASED | {"zero_hpz_partition_size": 2}
    compare("reduction", {"zero_optimization": grouped})
    check_resume(folder, "reduction", False, STOP, grouped)


@pytest.mark.slow
def test_a_run_with_secondary_partitions_is_the_run_without(tmp_path: Path) -> None:
    try:
        run_ranks(check_secondary_partitions, 4, str(tmp_path))
    finally:
        end_ranks(4)
