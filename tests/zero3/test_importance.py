"""Importance against oracles: the gradients recorded at the commit, and gradients computed from scratch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch import Tensor, nn

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
from tests.support.models import OddNet, TiedLM, TwoHeads, head_batch, late_batch, odd_batch
from tests.support.ranks import run_ranks
from tests.support.tiers import slow_but, values_first

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


@pytest.mark.parametrize(
    ("world_size", "offload", "apply"), values_first(covering([1, 2, 3, 4], [False, True], ["reduction", "update"]))
)
def test_importance_is_the_average_of_what_the_commit_shows(world_size: int, offload: bool, apply: str) -> None:
    run_ranks(check_recorded, world_size, OddNet, odd_batch, apply, {"offload": offload})


@pytest.mark.parametrize(
    ("model", "batch", "changes"),
    [
        (TiedLM, tied_batch, {}),
        (OddNet, odd_batch, {"bf16": {"enabled": True}}),
        pytest.param(
            OddNet,
            odd_batch,
            {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
            marks=pytest.mark.slow,
        ),
        (OddNet, odd_batch, {"zero_optimization": {"sub_group_size": 40}}),
        pytest.param(OddNet, odd_batch, {"zero_optimization": {"reduce_scatter": False}}, marks=pytest.mark.slow),
        pytest.param(OddNet, odd_batch, PARTIAL_OFFLOAD, marks=pytest.mark.slow),
    ],
    ids=["tied", "bf16", "bf16-fp32-accumulation", "sub-groups", "all-reduce", "partial-offload"],
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


@pytest.mark.parametrize("world_size", slow_but([1, 2, 3, 4], 1, 3))
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
    "partial-offload": PARTIAL_OFFLOAD,
}


@pytest.mark.parametrize(("world_size", "setting"), values_first(product([1, 2, 3], UNUSED)))
def test_stale_gradients_never_enter_importance(world_size: int, setting: str) -> None:
    run_ranks(check_alternating_heads, world_size, "reduction", UNUSED[setting])


def check_one_micro_batch_each(accumulation: int, changes: dict[str, Any]) -> None:
    """Each head is used by some micro-batches of a window only.

    ZeRO-3 adds the gradient of the second head, first used in the second micro-batch, to the last window's; and with
    offload the optimizer does not get that of a head which the last micro-batch does not use.
    """
    world_size = dist.get_world_size()
    config = ds_config(epi=_section("update", ratio=0.0), accumulation=accumulation, **changes)
    with engine_of(TwoHeads, config) as engine:
        twin = TwoHeads()
        expected = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in twin.named_parameters()}
        for step in range(4):
            with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
                twin.load_state_dict({n: p.detach().clone() for n, p in engine.module.named_parameters()})
            twin.zero_grad()
            for rank in range(world_size):
                for micro_batch in range(accumulation):
                    (twin(*late_batch(step, rank, micro_batch)) / (accumulation * world_size)).backward()
            for name, p in twin.named_parameters():
                expected[name] = DECAY * expected[name] + (1 - DECAY) * p.grad.double() ** 2
            train_step(engine, step, late_batch)
        for name, values in full_importance(engine).items():
            error = (values.double() - expected[name]).norm() / expected[name].norm()
            assert error < 1e-4, f"{name}: relative L2 error {error:.1e}"


@pytest.mark.parametrize(("accumulation", "setting"), values_first(product([2, 3], UNUSED)))
def test_a_parameter_of_some_micro_batches_is_measured_by_its_own_gradient(accumulation: int, setting: str) -> None:
    run_ranks(check_one_micro_batch_each, 2, accumulation, UNUSED[setting])


# Both heads in turn, then the first one only: the second head keeps its gradient of step 1.
STALE_STEPS = (0, 1, 2, 4, 6, 8, 10, 12)


def train_stale(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Train and return, for every step, the second head's masks in force, shown gradients and weights afterwards."""
    with engine_of(TwoHeads, config) as engine:
        optimizer = record(engine)
        trace = []
        for step in STALE_STEPS:
            masks = full_masks(engine) if "epi" in config else {}
            train_step(engine, step, head_batch)
            trace.append({"mask": masks, "shown": gather(engine, optimizer.recorded), "weight": full_weights(engine)})
        return trace


def check_stale_update_is_plain(apply: str, changes: dict[str, Any]) -> None:
    """An unused parameter's plastic entries move exactly as plain ZeRO-3 moves them, also after a release.

    A refresh isolates part of the unused head, and a later one releases all of it. The stale gradient that ZeRO-3
    applies then must be the one it would have kept, and not one that a mask has punched holes into.
    """
    # By importance itself: that of an unused head only falls, so that its entries are released.
    section = _section(apply) | {"selection": "raw_global", "ema_decay": 0.5}
    plain = train_stale(ds_config(gradient_clipping=0.0, **changes))
    isolated = train_stale(ds_config(gradient_clipping=0.0, epi=section, **changes))
    for name in ("heads.1.weight", "heads.1.bias"):
        ever = torch.zeros_like(plain[0]["weight"][name], dtype=torch.bool)
        for theirs, ours in zip(plain, isolated, strict=True):
            ever |= ours["mask"][name]
            assert torch.equal(theirs["shown"][name], ours["shown"][name]), name
            assert torch.equal(theirs["weight"][name][~ever], ours["weight"][name][~ever]), name
    masks = [step["mask"]["heads.1.weight"] for step in isolated]
    held = masks[2]
    assert 0 < int(held.sum()) < held.numel()
    assert plain[2]["shown"]["heads.1.weight"][held].abs().min() > 0
    # Released in the end, and moved again by the whole stale gradient.
    assert not masks[-1].any()
    before, after = (step["weight"]["heads.1.weight"] for step in isolated[-2:])
    assert (before != after)[held].all()


@pytest.mark.slow
@pytest.mark.parametrize("setting", UNUSED)
@pytest.mark.parametrize("apply", ["reduction", "update"])
def test_a_mask_leaves_stale_gradients_whole(setting: str, apply: str) -> None:
    run_ranks(check_stale_update_is_plain, 2, apply, UNUSED[setting])


# --- probes ---


def check_weight_after_a_probe() -> None:
    """A probe replaces the importance at full weight; what a later release makes of it knows that."""
    config = ds_config(epi=_section("reduction") | {"refresh_interval": 3}, gradient_clipping=0.0)
    with engine_of(OddNet, config) as engine:
        for step in range(2):
            train_step(engine, step, odd_batch)
        assert engine.epi.stats().counters.importance_weight == pytest.approx(1 - DECAY**2)
        engine.epi.probe(engine(*odd_batch(index, 0, 0)) for index in range(40, 42))
        assert engine.epi.stats().counters.importance_weight == 1.0
        before = full_masks(engine)
        train_step(engine, 2, odd_batch)
        assert engine.epi.stats().counters.importance_weight == pytest.approx(1.0)
        now, moments, importance = full_masks(engine), full_moments(engine), full_importance(engine)
        released = 0
        for name in now:
            entries = before[name] & ~now[name]
            released += int(entries.sum())
            # Without clipping, S * (1 - beta2^t) of an optimizer state of age 3.
            expected = importance[name][entries] * (1 - 0.99**3)
            torch.testing.assert_close(moments[f"{name}/exp_avg_sq"][entries], expected, rtol=1e-5, atol=0.0)
        assert released > 0


def test_a_probe_sets_the_weight_of_the_importance() -> None:
    run_ranks(check_weight_after_a_probe, 2)


LARGEST_SCALE = 2.0**12


def check_probe_scale(offload: bool) -> None:
    """Probes that overflow lower a dynamic loss scale until one does not. fp16 itself needs an accelerator."""
    section = {"policy": "static", "probe_steps": 8, "ratio": 0.2}
    with engine_of(OddNet, ds_config(epi=section, offload=offload)) as engine:
        optimizer = engine.optimizer
        optimizer.loss_scaler = DynamicLossScaler(
            init_scale=2.0**16, scale_window=1000, min_scale=1, delayed_shift=2, consecutive_hysteresis=False
        )
        parameter = dict(engine.module.named_parameters())["head.weight"]
        infinite = torch.full(parameter.ds_shape, float("inf"))
        handle = parameter.register_hook(lambda g: infinite if optimizer.loss_scale > LARGEST_SCALE else g)
        with pytest.raises(RuntimeError, match=r"no finite gradient.*the loss scale is 32768 now"):
            engine.epi.probe(engine(*odd_batch(index, 0, 0)) for index in range(2))
        refresh = engine.epi.probe(engine(*odd_batch(index, 0, 0)) for index in range(8))
        handle.remove()
        assert optimizer.loss_scale == LARGEST_SCALE
        assert refresh.isolated == engine.epi.stats().isolated > 0


@pytest.mark.parametrize("offload", [False, True], ids=["device", "offload"])
def test_probes_that_overflow_lower_the_loss_scale(offload: bool) -> None:
    run_ranks(check_probe_scale, 2, offload)


def check_failing_probe() -> None:
    """A loss that raises leaves the accumulation boundaries to the engine again."""

    def losses(engine: Any) -> Iterator[Tensor]:
        yield engine(*odd_batch(0, 0, 0))
        raise LookupError("no more data")

    with engine_of(OddNet, ds_config(epi=_section("reduction"), accumulation=2)) as engine:
        with pytest.raises(LookupError):
            engine.epi.probe(losses(engine))
        assert not engine.is_gradient_accumulation_boundary()
        train_step(engine, 0, odd_batch)
        assert engine.epi.stats().counters.applied_steps == 1


def test_a_probe_that_fails_leaves_the_engine_usable() -> None:
    run_ranks(check_failing_probe, 2)
