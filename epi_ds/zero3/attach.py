"""Put isolation on a DeepSpeed engine that exists."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from epi_ds.checkpoint.commit import Run
from epi_ds.checkpoint.meeting import leave_word
from epi_ds.choices import Apply, PolicyName, Protects, Pull, StateFormat
from epi_ds.config import EPIConfig
from epi_ds.errors import UserError
from epi_ds.isolation.controller import IsolationController
from epi_ds.isolation.fit import check_budget, refresh_cost
from epi_ds.isolation.importance.views import Importance
from epi_ds.isolation.layout import Layout
from epi_ds.isolation.placement import Placement
from epi_ds.isolation.policy import make_policy
from epi_ds.isolation.search.collectives import GroupExchange
from epi_ds.zero3.context import IsolationContext
from epi_ds.zero3.first_moments import FirstMoments
from epi_ds.zero3.geometry import layout_of
from epi_ds.zero3.guard import check_engine, has_resumed
from epi_ds.zero3.handle import EPI
from epi_ds.zero3.mixin import IsolationMixin
from epi_ds.zero3.persistence.engine import IsolationEngineMixin
from epi_ds.zero3.second_moments import SecondMoments

logger = logging.getLogger(__name__)


def _check_partitioning(layout: Layout, optimizer: Any) -> None:
    sizes = tuple(optimizer.fp16_partitioned_groups_flat_numel)
    if layout.sub_group_numel != sizes:
        raise RuntimeError(
            f"ZeRO-3 partitions its sub-groups into {sizes} entries on this rank, and isolation expected "
            f"{layout.sub_group_numel}: masks would be shifted. Report this with your ds_config"
        )


def _moments_of(optimizer: Any, config: EPIConfig) -> Importance | None:
    """Return what the optimizer keeps and isolation ranks by; None where it ranks by something of its own."""
    if config.policy is PolicyName.MOMENTUM:
        return FirstMoments(optimizer)
    return SecondMoments(optimizer) if config.state is StateFormat.ADAM else None


def _warn_if_mostly_frozen(engine: Any) -> None:
    """Say that isolation is of little use where most of the model does not move anyway, as under an adapter."""
    parameters = list(engine.module.parameters())
    frozen = [p.ds_numel for p in parameters if not p.requires_grad]
    trainable = [p.ds_numel for p in parameters if p.requires_grad]
    if sum(frozen) > sum(trainable):
        logger.warning(
            "%d parameters with %d entries are frozen and keep their values anyway; isolation protects only the %d "
            "trainable ones with %d entries, such as those of an adapter",
            len(frozen),
            sum(frozen),
            len(trainable),
            sum(trainable),
        )


def _sets_moments(config: EPIConfig) -> bool:
    """Whether a new mask changes moments: under ``apply: update`` they track every gradient, and a pull in it too."""
    return config.apply is Apply.REDUCTION or (config.anchor is not None and config.anchor.pull is Pull.GRADIENT)


def attach(engine: Any, config: EPIConfig) -> EPI:
    """Make ``engine`` isolate parameters as ``config`` says; return its handle, which is also ``engine.epi``.

    Collective. The engine and its ZeRO-3 optimizer are mutated: their classes, DeepSpeed's own and no subclasses of
    them, gain a mixin each. See [Note: names] in handle.py.
    Raises ValueError or RuntimeError before anything is changed; see `check_engine`.
    """
    if isinstance(engine, IsolationEngineMixin):
        raise UserError("this engine has isolation attached already; use engine.epi")
    check_engine(engine, config)
    optimizer = engine.optimizer
    layout = layout_of(optimizer, layer=config.layer, include=config.include, exclude=config.exclude)
    _check_partitioning(layout, optimizer)
    check_budget(layout, config)
    moments = _moments_of(optimizer, config)
    controller = IsolationController(
        Placement(layout, tuple(partition.device for partition in optimizer.fp32_partitioned_groups_flat)),
        config,
        policy=make_policy(config),
        exchange=GroupExchange(
            optimizer.dp_process_group,
            device=torch.device(get_accelerator().current_device_name()),
            transport=refresh_cost(
                layout, config, world_size=dist.get_world_size(optimizer.dp_process_group)
            ).transport,
        ),
        listener=partial(IsolationMixin._epi_mask_changes, optimizer) if _sets_moments(config) else None,
        moments=moments,
    )
    run = Run(config.checkpoint)
    context = IsolationContext(optimizer, controller, newest_checkpoint=lambda: run.last_checkpoint)
    optimizer.__class__ = type(f"Isolating{type(optimizer).__name__}", (IsolationMixin, type(optimizer)), {})
    optimizer._epi_context = context
    engine.__class__ = type(f"Isolating{type(engine).__name__}", (IsolationEngineMixin, type(engine)), {})
    engine.epi = EPI(engine, controller, run=run)
    leave_word()
    controller.begin()
    if dist.get_rank() == 0:
        _tell_of(engine, controller, moments)
    return engine.epi


def _tell_of(engine: Any, controller: IsolationController, moments: Importance | None) -> None:
    """Log what isolation was attached to, and what is easily taken for something else."""
    config, layout = controller.config, controller.layout
    _warn_if_mostly_frozen(engine)
    if has_resumed(engine):
        logger.warning(
            "isolation begins at step %d of a checkpoint that was loaded before it: importance starts from zero "
            "(missing_state: fresh)",
            engine.global_steps,
        )
    logger.info(
        "isolation attached: policy %s, %d parameters with %d entries in %d layers, %s ranks",
        config.policy.value,
        len(layout.segments),
        layout.covered_numel,
        len(layout.layer_names),
        controller.exchange.world_size,
    )
    if config.protects is Protects.PAST:
        logger.info(
            "protects: past isolates nothing until a stage has ended, by engine.epi.finish_stage() or remember()"
        )
    if isinstance(moments, SecondMoments):
        logger.info(
            "importance is Adam's exp_avg_sq, so its effective ema_decay is beta2: %s",
            ", ".join(str(decay) for decay in sorted(set(moments.decays))),
        )


def detach(engine: Any) -> None:
    """Take isolation off an engine that `attach` put it on: its classes and attributes are those of before."""
    for mixed in (engine, engine.optimizer):
        mixed.__class__ = type(mixed).__bases__[1]
    del engine.epi, engine.optimizer._epi_context
