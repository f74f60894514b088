"""Importance against oracles: the gradients recorded at the commit, and gradients computed from scratch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support.engines import assert_same, ds_config, engine_of, full_importance, train_step
from tests.support.models import OddNet, TiedLM, TwoHeads, odd_batch
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.zero3

DECAY = 0.8
STEPS = 6


def _section(apply: str, ratio: float = 0.2) -> dict[str, Any]:
    return {"ratio": ratio, "refresh_interval": 2, "ema_decay": DECAY, "apply": apply}


class CommitRecorder:
    """Mixed over an optimizer: keeps what the commit point shows of every parameter, before anything acts on it."""

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: Tensor) -> None:
        gradient = self.fp32_partitioned_groups_flat[sub_group_id].grad
        for parameter in self.fp16_groups[sub_group_id]:
            _, offset, numel = self.grad_position[self.get_param_id(parameter)]
            self.recorded[self.param_names[parameter]] = gradient.narrow(0, offset, numel).clone()
        super().unscale_and_clip_grads(sub_group_id, total_norm)


def record(engine: Any) -> Any:
    optimizer = engine.optimizer
    optimizer.__class__ = type("Recording", (CommitRecorder, type(optimizer)), {})
    optimizer.recorded = {}
    return optimizer


def gather(engine: Any, recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    full = {}
    for name, parameter in engine.module.named_parameters():
        parts = [torch.empty_like(recorded[name]) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, recorded[name])
        full[name] = torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)
    return full


def assert_importance(engine: Any, expected: dict[str, Tensor], *, rtol: float) -> None:
    for name, values in full_importance(engine).items():
        torch.testing.assert_close(
            values.double(), expected[name], rtol=rtol, atol=0.0, msg=lambda m, n=name: f"{n}: {m}"
        )


def check_recorded(model: type[nn.Module], batch: Callable[..., Any], apply: str, changes: dict[str, Any]) -> None:
    with engine_of(model, ds_config(epi=_section(apply), accumulation=3, **changes)) as engine:
        optimizer = record(engine)
        expected = {name: torch.zeros(p.ds_shape, dtype=torch.float64) for name, p in engine.module.named_parameters()}
        for step in range(STEPS):
            train_step(engine, step, batch)
            for name, gradient in gather(engine, optimizer.recorded).items():
                expected[name] = DECAY * expected[name] + (1 - DECAY) * gradient.double() ** 2
        assert engine.epi.stats().isolated > 0
        # fp32 against fp64 arithmetic: three roundings a step of 6e-8 each, over six steps with decay.
        assert_importance(engine, expected, rtol=1e-6)


def tied_batch(step: int, rank: int, micro_batch: int) -> tuple[Tensor, Tensor]:
    tokens, _ = odd_batch(step, rank, micro_batch)
    return tokens, tokens.flip(1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("offload", [False, True], ids=["device", "offload"])
@pytest.mark.parametrize("apply", ["reduction", "update"])
def test_importance_is_the_average_of_what_the_commit_shows(world_size: int, offload: bool, apply: str) -> None:
    run_ranks(check_recorded, world_size, OddNet, odd_batch, apply, {"offload": offload})


@pytest.mark.parametrize(
    ("model", "batch", "changes"),
    [
        (TiedLM, tied_batch, {}),
        (OddNet, odd_batch, {"bf16": {"enabled": True}}),
        (OddNet, odd_batch, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
        (OddNet, odd_batch, {"zero_optimization": {"sub_group_size": 40}}),
        (OddNet, odd_batch, {"zero_optimization": {"reduce_scatter": False}}),
    ],
    ids=["tied", "bf16", "bf16-fp32-accumulation", "sub-groups", "all-reduce"],
)
def test_importance_in_other_settings(
    model: type[nn.Module], batch: Callable[..., Any], changes: dict[str, Any]
) -> None:
    run_ranks(check_recorded, 2, model, batch, "reduction", changes)


def check_own_gradients(apply: str, offload: bool) -> None:
    """The oracle computes the averaged gradient of every step itself, from the weights that ZeRO-3 has then."""
    world_size, accumulation = dist.get_world_size(), 2
    config = ds_config(epi=_section(apply), accumulation=accumulation, offload=offload)
    with engine_of(OddNet, config) as engine:
        twin = OddNet()
        expected = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in twin.named_parameters()}
        for step in range(STEPS):
            with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
                twin.load_state_dict({name: p.detach().clone() for name, p in engine.module.named_parameters()})
            twin.zero_grad()
            for rank in range(world_size):
                for micro_batch in range(accumulation):
                    (twin(*odd_batch(step, rank, micro_batch)) / (world_size * accumulation)).backward()
            for name, p in twin.named_parameters():
                expected[name] = DECAY * expected[name] + (1 - DECAY) * p.grad.double() ** 2
            train_step(engine, step, odd_batch)
        for name, values in full_importance(engine).items():
            error = (values.double() - expected[name]).norm() / expected[name].norm()
            # Sums of the same fp32 numbers in another order, squared.
            assert error < 1e-4, f"{name}: relative L2 error {error:.1e}"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_importance_equals_an_oracle_with_its_own_gradients(world_size: int) -> None:
    run_ranks(check_own_gradients, world_size, "reduction", False)
    run_ranks(check_own_gradients, world_size, "update", True)


def check_loss_scale() -> None:
    """A loss scale leaves importance as it is, also in the step in which a dynamic scaler raises it."""
    results = []
    for scale in (1.0, 512.0):
        with engine_of(OddNet, ds_config(epi=_section("reduction"))) as engine:
            engine.optimizer.override_loss_scale(scale)
            for step in range(STEPS):
                train_step(engine, step, odd_batch)
            results.append(full_importance(engine))
    # A power of two only moves exponents, and nothing here comes near the ends of their range.
    assert_same(*results)


def test_loss_scale_does_not_enter_importance() -> None:
    run_ranks(check_loss_scale, 2)


class GrowingScale:
    """Mixed over an optimizer: doubles the loss scale between backward and unscaling, as DeepSpeed's dynamic scaler
    does after enough good steps. fp16, where that happens, needs an accelerator."""

    def _update_scale(self, has_overflow: bool = False) -> None:
        self.override_loss_scale(self.loss_scale * 2)


def check_growing_scale() -> None:
    with engine_of(OddNet, ds_config(epi=_section("reduction", ratio=0.0))) as engine:
        optimizer = record(engine)
        optimizer.override_loss_scale(64.0)
        optimizer.__class__ = type("Growing", (GrowingScale, type(optimizer)), {})
        train_step(engine, 0, odd_batch)
        expected = {n: (1 - DECAY) * (g.double() / 64.0) ** 2 for n, g in gather(engine, optimizer.recorded).items()}
        assert_importance(engine, expected, rtol=1e-6)


def test_importance_uses_the_scale_of_the_backward() -> None:
    run_ranks(check_growing_scale, 2)


# --- parameters that a window does not use ---


def head_batch(step: int, rank: int, micro_batch: int) -> tuple[Tensor, int]:
    generator = torch.Generator().manual_seed(1_000_003 * step + 1009 * rank + micro_batch)
    return torch.randn(4, 7, generator=generator), step % 2


def check_alternating_heads(apply: str, changes: dict[str, Any]) -> None:
    with engine_of(TwoHeads, ds_config(epi=_section(apply), accumulation=2, **changes)) as engine:
        optimizer = record(engine)
        names = [name for name, _ in engine.module.named_parameters()]
        expected = {name: torch.zeros(p.ds_shape, dtype=torch.float64) for name, p in engine.module.named_parameters()}
        shown_stale = 0
        for step in range(STEPS):
            train_step(engine, step, head_batch)
            shown = gather(engine, optimizer.recorded)
            for name in names:
                used = not name.startswith(f"heads.{1 - step % 2}")
                # The trap: the unused head shows its last gradient at the commit point, not zero.
                shown_stale += not used and bool((shown[name] != 0).any())
                gradient = shown[name].double() if used else 0.0
                expected[name] = DECAY * expected[name] + (1 - DECAY) * gradient**2
        assert shown_stale > 0
        assert_importance(engine, expected, rtol=1e-6)


UNUSED = {
    "several-parameters": {},
    "one-parameter-sub-groups": {"zero_optimization": {"sub_group_size": 1}},
    "offload": {"offload": True},
}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("setting", UNUSED)
def test_stale_gradients_never_enter_importance(world_size: int, setting: str) -> None:
    run_ranks(check_alternating_heads, world_size, "reduction", UNUSED[setting])


def late_batch(step: int, rank: int, micro_batch: int) -> tuple[Tensor, int]:
    """The second head is used by the second micro-batch only."""
    generator = torch.Generator().manual_seed(1_000_003 * step + 1009 * rank + micro_batch)
    return torch.randn(4, 7, generator=generator), micro_batch


def check_late_head(offload: bool) -> None:
    """A head first used in a window's second micro-batch: ZeRO-3 adds its gradient to the last window's."""
    world_size = dist.get_world_size()
    config = ds_config(epi=_section("update", ratio=0.0), accumulation=2, offload=offload)
    with engine_of(TwoHeads, config) as engine:
        twin = TwoHeads()
        name = "heads.1.weight"
        expected = torch.zeros(5, 9, dtype=torch.float64)
        for step in range(4):
            with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
                twin.load_state_dict({n: p.detach().clone() for n, p in engine.module.named_parameters()})
            twin.zero_grad()
            for rank in range(world_size):
                (twin(*late_batch(step, rank, 1)) / (2 * world_size)).backward()
            expected = DECAY * expected + (1 - DECAY) * twin.heads[1].weight.grad.double() ** 2
            train_step(engine, step, late_batch)
        error = (engine.epi.importance(name).double() - expected).norm() / expected.norm()
        assert error < 1e-4


@pytest.mark.parametrize("offload", [False, True], ids=["device", "offload"])
def test_a_late_parameter_is_measured_by_its_own_gradient(offload: bool) -> None:
    run_ranks(check_late_head, 2, offload)


def check_stale_update_is_plain(apply: str, changes: dict[str, Any]) -> None:
    """An unused parameter's plastic entries move exactly as plain ZeRO-3 moves them, also after a release.

    One window isolates part of the unused head and the next releases all of it. The stale gradient that ZeRO-3
    applies then must be the one it would have kept, and not one that a mask has punched holes into.
    """
    config = ds_config(epi=_section(apply), gradient_clipping=0.0, **changes)
    with engine_of(TwoHeads, config) as engine:
        optimizer = record(engine)
        for step in range(2):
            train_step(engine, step, head_batch)
        name = "heads.1.weight"
        mask = engine.epi.mask(name)
        assert 0 < int(mask.sum()) < mask.numel()
        train_step(engine, 2, head_batch)  # under the mask, head 1 unused
        first = gather(engine, optimizer.recorded)[name]
        train_step(engine, 4, head_batch)  # still unused: shows what the step before left
        second = gather(engine, optimizer.recorded)[name]
        assert first[mask].abs().min() > 0
        assert torch.equal(first, second)


@pytest.mark.parametrize("setting", UNUSED)
@pytest.mark.parametrize("apply", ["reduction", "update"])
def test_a_mask_leaves_stale_gradients_whole(setting: str, apply: str) -> None:
    run_ranks(check_stale_update_is_plain, 2, apply, UNUSED[setting])
