"""Isolated means bit-identical, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from epi_ds.isolation.layout import Span, merge_spans
from epi_ds.kernels import pack_bits
from epi_ds.zero3.step_energy import SAMPLE_NUMEL, UpdateSample
from tests.support.covering import covering
from tests.support.engines import (
    PARTIAL_OFFLOAD,
    assert_same,
    ds_config,
    engine_of,
    full_masks,
    full_moments,
    full_weights,
    train_step,
)
from tests.support.models import OddNet, TwoHeads, decay_groups, head_batch, odd_batch
from tests.support.ranks import run_ranks
from tests.support.tiers import slow_but, values_first

pytestmark = pytest.mark.zero3

INTERVAL = 4


def check_hold(apply: str, changes: dict[str, Any], model: Callable[[], nn.Module] = OddNet) -> int:
    """Train four windows; return how many entries the masks of the last three isolated."""
    section = {"ratio": 0.2, "refresh_interval": INTERVAL, "ema_decay": 0.9, "apply": apply}
    total = 0
    with engine_of(model, ds_config(epi=section, accumulation=4, **changes)) as engine:
        masks: dict[str, Tensor] | None = None
        for step in range(4 * INTERVAL):
            before = full_weights(engine)
            train_step(engine, step, odd_batch)
            after = full_weights(engine)
            if masks is not None:
                _check_step(before, after, masks)
                if apply == "reduction":
                    moments = full_moments(engine)
                    # At isolation set to zero; zero gradients keep it there until the refresh that releases it.
                    if (step + 1) % INTERVAL:
                        assert all((moments[f"{name}/exp_avg"][mask] == 0).all() for name, mask in masks.items())
            if (step + 1) % INTERVAL == 0:
                masks = full_masks(engine)
                total += sum(int(mask.sum()) for mask in masks.values())
                assert engine.epi.stats().isolated == sum(int(mask.sum()) for mask in masks.values())
        assert engine.epi.stats().counters.active_steps == 3 * INTERVAL
    return total


def _check_step(before: dict[str, Tensor], after: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
    isolated, moved = 0, 0
    for name, mask in masks.items():
        held = before[name].view(torch.int32)[mask], after[name].view(torch.int32)[mask]
        assert torch.equal(*held), name
        isolated += int(mask.sum())
        moved += int((before[name] != after[name])[~mask].sum())
    plastic = sum(mask.numel() for mask in masks.values()) - isolated
    assert isolated > 0
    # Nearly every plastic entry moves (weight decay alone moves it); unused embedding rows have no gradient.
    assert moved > 0.9 * plastic


PLACEMENTS = {
    "device": {},
    "offload": {"offload": True},
    "parameter-offload": {"offload": True, "zero_optimization": {"offload_param": {"device": "cpu"}}},
    "partial-offload": PARTIAL_OFFLOAD,
    "sub-groups": {"zero_optimization": {"sub_group_size": 60}},
    "offload-sub-groups": {"offload": True, "zero_optimization": {"sub_group_size": 60}},
    "all-reduce": {"zero_optimization": {"reduce_scatter": False}},
    "scattered-gradients": {"zero_optimization": {"contiguous_gradients": False}},
    "bf16": {"bf16": {"enabled": True}},
    "bf16-fp32-accumulation": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
}


@pytest.mark.parametrize(
    ("world_size", "apply", "placement"),
    values_first(covering([1, 2, 3, 4], ["reduction", "update"], ["device", "offload"])),
)
def test_isolated_entries_do_not_move(world_size: int, apply: str, placement: str) -> None:
    assert run_ranks(check_hold, world_size, apply, PLACEMENTS[placement])[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("apply", ["reduction", "update"])
@pytest.mark.parametrize("placement", [name for name in PLACEMENTS if name not in {"device", "offload"}])
def test_isolated_entries_do_not_move_in_other_placements(apply: str, placement: str) -> None:
    assert run_ranks(check_hold, 3, apply, PLACEMENTS[placement])[0] > 0


def check_update_only_undoes(folder: str, placement: dict[str, Any]) -> None:
    """Under `apply: update` the moments and, without clipping, the plastic weights are plain ZeRO-3's for a window."""
    changes: dict[str, Any] = {"gradient_clipping": 0.0, **placement}
    section = {"ratio": 0.2, "refresh_interval": INTERVAL, "ema_decay": 0.9, "apply": "update"}
    states, masks, before = [], {}, {}
    for epi in (None, section):
        with engine_of(OddNet, ds_config(epi=epi, **changes)) as engine:
            for step in range(INTERVAL + 1):
                before = full_weights(engine)
                train_step(engine, step, odd_batch)
            states.append((full_weights(engine), full_moments(engine)))
            if epi:
                masks = full_masks(engine)
                assert engine.epi.stats().counters.measured_steps == 0
                engine.save_checkpoint(folder)
                counters = engine.epi.stats().counters
                train_step(engine, INTERVAL + 1, odd_batch)
                train_step(engine, INTERVAL + 2, odd_batch)
                # The step after the save noted nothing twice.
                assert engine.epi.stats().counters.measured_steps == 2
                for step in range(INTERVAL + 3, 2 * INTERVAL):
                    train_step(engine, step, odd_batch)
                refresh = engine.epi.stats().last_refresh
                assert 0 < refresh.held_step_energy < 1
                assert refresh.step == 2 * INTERVAL
    (plain_weights, plain_moments), (weights, moments) = states
    assert_same(plain_moments, moments)
    for name, mask in masks.items():
        assert torch.equal(plain_weights[name][~mask], weights[name][~mask])
    # What the isolated entries would have moved by is what plain ZeRO-3 moved them by, from the same weights.
    updates = {name: (plain_weights[name].double() - before[name].double()).square() for name in masks}
    held = sum(float(squares[masks[name]].sum()) for name, squares in updates.items())
    assert counters.measured_steps == 1
    # Sums of fewer than 2^16 squares in fp64, in another order.
    assert counters.held_step_energy == pytest.approx(held / sum(float(s.sum()) for s in updates.values()), rel=1e-9)


@pytest.mark.parametrize("placement", slow_but(["device", "offload", "partial-offload"], "device"))
def test_update_mode_changes_nothing_but_the_held_weights(tmp_path: Path, placement: str) -> None:
    run_ranks(check_update_only_undoes, 3, str(tmp_path), PLACEMENTS[placement])


@pytest.mark.parametrize("numel", [0, 1, 1000, SAMPLE_NUMEL, SAMPLE_NUMEL + 1, 5 * SAMPLE_NUMEL - 3])
def test_samples_of_all_steps_together_are_the_whole_update(numel: int) -> None:
    generator = torch.Generator().manual_seed(0)
    before, update = torch.randn(numel, generator=generator), torch.randn(numel, generator=generator)
    mask = torch.rand(numel, generator=generator) < 0.1
    bits = torch.empty(-(-numel // 8), dtype=torch.uint8)
    pack_bits(mask, bits)
    stride = max(1, -(-numel // SAMPLE_NUMEL))
    after = before + update
    spans = merge_spans([Span(0, numel // 5), Span(numel // 5, numel // 3), Span(numel // 2, numel - numel // 7)])
    padding = torch.ones(numel, dtype=torch.bool)
    for start, stop in spans:
        padding[start:stop] = False
    squares = (after.double() - before.double()).square()[~padding]
    mask = mask[~padding]
    # Memory that nobody has written to.
    before[padding], after[padding] = torch.nan, torch.inf
    steps = range(7 * stride, 8 * stride)
    found = [UpdateSample(before, bits, spans=spans, step=step).energies(after) for step in steps]
    # The mean over as many steps as there are offsets; squares in fp64, in another order.
    mean = torch.stack(found).mean(dim=0)
    assert mean.tolist() == pytest.approx([float(squares[mask].sum()), float(squares.sum())], rel=1e-9)
    if stride > 1:
        assert not torch.equal(found[0], found[1])


def check_masked_norm(apply: str, changes: dict[str, Any]) -> None:
    """The norm of a step under a mask is over the plastic entries of the gradient that plain ZeRO-3 would clip."""
    section = {"ratio": 0.3, "refresh_interval": 2, "ema_decay": 0.5, "apply": apply}
    with engine_of(OddNet, ds_config(epi=section, accumulation=2, **changes)) as engine:
        for step in range(2):
            train_step(engine, step, odd_batch)
        masks = full_masks(engine)
        decay = 0.5
        importance = {name: engine.epi.importance(name).clone() for name in masks}
        train_step(engine, 2, odd_batch)
        squares, whole = 0.0, 0.0
        for name, mask in masks.items():
            # The importance saw the raw gradient of this step: S' = d*S + (1-d)*g^2.
            squared = (engine.epi.importance(name).double() - decay * importance[name].double()) / (1 - decay)
            squares += float(squared[~mask].sum())
            whole += float(squared.sum())
        # fp32 importance is recovered by a difference: a few parts in 1e6.
        assert float(engine.get_global_grad_norm()) == pytest.approx(squares**0.5, rel=1e-5)
        counters = engine.epi.stats().counters
        assert counters.held_steps == 1
        assert counters.held_gradient_energy > 0.1
        assert counters.held_gradient_energy == pytest.approx(1 - squares / whole, rel=1e-4)
        train_step(engine, 3, odd_batch)
        refresh = engine.epi.stats().last_refresh
        assert refresh is not None
        assert refresh.held_gradient_energy is not None
        # The mean over both steps under the mask, so the second one's share is what is left.
        assert 0 < 2 * refresh.held_gradient_energy - counters.held_gradient_energy < 1
        assert engine.epi.stats().counters.held_steps == 0


@pytest.mark.parametrize(
    ("placement", "apply"), values_first(product(["device", "offload", "partial-offload"], ["reduction", "update"]))
)
def test_norm_is_over_the_entries_that_will_move(placement: str, apply: str) -> None:
    run_ranks(check_masked_norm, 3, apply, PLACEMENTS[placement])


def check_param_groups(changes: dict[str, Any]) -> None:
    """Two parameter groups with their own learning rate and weight decay, in several sub-groups."""
    section = {"ratio": 0.2, "refresh_interval": 3, "ema_decay": 0.9}
    with engine_of(OddNet, ds_config(epi=section, **changes), model_parameters=decay_groups) as engine:
        assert len(engine.optimizer.param_groups) == 2
        for step in range(3):
            train_step(engine, step, odd_batch)
        masks = full_masks(engine)
        for step in range(3, 6):
            before = full_weights(engine)
            train_step(engine, step, odd_batch)
            _check_step(before, full_weights(engine), masks)


@pytest.mark.parametrize("placement", ["sub-groups", "partial-offload"])
def test_several_param_groups_hold(placement: str) -> None:
    run_ranks(check_param_groups, 2, PLACEMENTS[placement])


def check_hold_unused(apply: str, changes: dict[str, Any]) -> int:
    """Hold through windows in which ZeRO-3 applies an unused parameter's old gradient; return what was isolated of it.

    The heads are used in turn, and every mask is in force for two windows, so that each head is unused in one of them.
    """
    section = {"ratio": 0.3, "refresh_interval": 2, "ema_decay": 0.9, "apply": apply, "layer": "tensor"}
    isolated_heads = 0
    with engine_of(TwoHeads, ds_config(epi=section, accumulation=2, **changes)) as engine:
        for step in range(8):
            masks, before = full_masks(engine), full_weights(engine)
            train_step(engine, step, head_batch)
            if step < 2:
                continue
            _check_step(before, full_weights(engine), masks)
            isolated_heads += int(masks[f"heads.{1 - step % 2}.weight"].sum())
    return isolated_heads


UNUSED = {
    "device": {},
    "offload": {"offload": True},
    "partial-offload": PARTIAL_OFFLOAD,
    "one-parameter-sub-groups": {"zero_optimization": {"sub_group_size": 1}},
}


@pytest.mark.parametrize(("setting", "apply"), values_first(product(UNUSED, ["reduction", "update"])))
def test_isolated_entries_of_an_unused_parameter_do_not_move(setting: str, apply: str) -> None:
    assert run_ranks(check_hold_unused, 2, apply, UNUSED[setting])[0] > 0
