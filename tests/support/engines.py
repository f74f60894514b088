"""Real ZeRO-3 engines on the ranks of a pool, and what tests read off them. Runs inside ranks."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

import epi_ds

MOMENTS = ("exp_avg", "exp_avg_sq")


def ds_config(
    *, epi: dict[str, Any] | None = None, offload: bool = False, accumulation: int = 1, **changes: Any
) -> dict[str, Any]:
    """A ZeRO-3 configuration with clipping on, weight decay 0.1 and warm momentum."""
    zero: dict[str, Any] = {"stage": 3, "reduce_bucket_size": 400}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    zero.update(changes.pop("zero_optimization", {}))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "betas": [0.9, 0.99]}},
        "zero_optimization": zero,
        "steps_per_print": 10**9,
        **changes,
    }
    if epi is not None:
        # What tests compute back from importance is exact in fp32; the other states have tests of their own.
        config["epi"] = {"state": "fp32", **epi}
    return config


@contextmanager
def two_devices(config: dict[str, Any]) -> Iterator[None]:
    """Let partial offload tell the accelerator from the host while an engine is made.

    The only stand-in: on the CPU both are called "cpu", and ZeRO-3 would step all sub-groups by one optimizer.
    """
    accelerator = get_accelerator()
    name = accelerator._name
    if config.get("zero_optimization", {}).get("offload_optimizer", {}).get("ratio", 1.0) < 1.0:
        accelerator._name = "cpu:0"
    try:
        yield
    finally:
        accelerator._name = name


@contextmanager
def engine_of(model: Callable[[], nn.Module], config: dict[str, Any], **kwargs: Any) -> Iterator[Any]:
    """Yield an engine over a freshly seeded model: isolated when ``config`` has an ``epi`` section, else plain."""
    torch.manual_seed(0)
    module = model()
    kwargs = {key: value(module) if callable(value) else value for key, value in kwargs.items()}
    start = epi_ds.initialize if "epi" in config else deepspeed.initialize
    with two_devices(config):
        engine, *_ = start(model=module, config=copy.deepcopy(config), **kwargs)
    try:
        yield engine
    finally:
        engine.destroy()


@contextmanager
def collected_logs() -> Iterator[list[str]]:
    """Collect what the package logs."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Collect()
    logging.getLogger("epi_ds").addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger("epi_ds").removeHandler(handler)


def full_weights(engine: Any) -> dict[str, Tensor]:
    """Gather the fp32 master weights of the trainable parameters. Collective."""
    trainable = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    return {name: safe_get_full_fp32_param(p).clone() for name, p in trainable.items()}


PARTIAL_OFFLOAD: dict[str, Any] = {
    "offload": True,
    "zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}, "sub_group_size": 60},
}
"""Changes for `ds_config`: the first half of several sub-groups on the accelerator, the other on the host."""


def full_moments(engine: Any) -> dict[str, Tensor]:
    """Gather Adam's moments, by ``name/moment``. Collective."""
    # DeepSpeed looks for them in its first optimizer only; with partial offload there is a second one.
    first, second = engine.optimizer.optimizer.state, getattr(engine.optimizer, "backup_optimizer", None)
    added = {} if second is None else dict(second.state)
    first.update(added)
    try:
        return {
            f"{name}/{key}": safe_get_full_optimizer_state(p, key).clone()
            for name, p in engine.module.named_parameters()
            if p.requires_grad
            for key in MOMENTS
        }
    finally:
        for partition in added:
            del first[partition]


def full_masks(engine: Any) -> dict[str, Tensor]:
    """Gather the masks. Collective."""
    return {name: engine.epi.mask(name) for name in engine.epi.parameter_names}


def full_importance(engine: Any) -> dict[str, Tensor]:
    """Gather the importance. Collective."""
    return {name: engine.epi.importance(name).clone() for name in engine.epi.parameter_names}


def full_state(engine: Any, name: str) -> dict[str, Tensor]:
    """Gather one of the controller's states. Collective."""
    controller = engine.epi.controller
    gathered = {}
    for segment in controller.layout.segments:
        padded = torch.zeros(segment.partition_numel)
        padded[: segment.real_numel] = controller.states[name].read(segment, 0, segment.real_numel)
        whole = controller.exchange.concatenate(padded)
        gathered[segment.name] = whole[: math.prod(segment.shape)].view(segment.shape)
    return gathered


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Assert equality of every bit, and name what differs."""
    assert left.keys() == right.keys()
    different = {
        name: (left[name] - right[name]).abs().max().item() for name in left if not left[name].equal(right[name])
    }
    assert not different, f"bits differ (largest difference): {different}"


def train_step(engine: Any, step: int, batch: Callable[[int, int, int], tuple[Any, ...]]) -> list[Tensor]:
    """Take one optimizer step; return this rank's micro-batch losses."""
    losses = []
    for micro_batch in range(engine.gradient_accumulation_steps()):
        loss = engine(*batch(step, dist.get_rank(), micro_batch))
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach().clone())
    return losses
