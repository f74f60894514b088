"""What isolation works with, checked before anything is changed: refusals that say what, why and what to set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from epi_ds.choices import Apply, MissingState, PolicyName, Pull, StateFormat
from epi_ds.combinations import (
    adam_state_nvme_problem,
    adam_state_optimizer_problem,
    adam_state_ratio_problem,
    anchor_optimizer_problem,
    momentum_nvme_problem,
    momentum_optimizer_problem,
    reduction_optimizer_problem,
    stage_problem,
)
from epi_ds.config import EPIConfig
from epi_ds.errors import UserError

SUPPORTED_DEEPSPEED = SpecifierSet(">=0.19.8,<0.20", prereleases=True)

# The one name that isolation takes on an engine. See [Note: names] in handle.py.
ENGINE_ATTRIBUTE = "epi"

# Optimizers whose moments `apply: reduction` knows how to set at isolation and at release.
ADAM_FAMILY = (FusedAdam, DeepSpeedCPUAdam, torch.optim.Adam, torch.optim.AdamW)


def check_engine(engine: Any, config: EPIConfig) -> None:
    """Raise where isolation cannot act on ``engine`` as configured.

    RuntimeError for an unsupported DeepSpeed release, ValueError for an unsupported configuration, which lists every
    reason found.
    """
    installed = Version(deepspeed.__version__)
    if installed not in SUPPORTED_DEEPSPEED:
        raise RuntimeError(
            f"deepspeed {installed} is installed, but isolation overrides methods of deepspeed {SUPPORTED_DEEPSPEED}; "
            "install a release in that range"
        )
    check_is_engine(engine)
    reasons = list(_engine_reasons(engine)) or [
        *_optimizer_reasons(engine.optimizer, config),
        *_history_reasons(engine, config),
    ]
    if reasons:
        raise UserError("isolation cannot be attached to this engine:\n" + "\n".join(f"  - {r}" for r in reasons))


def check_is_engine(engine: Any) -> None:
    """Raise ValueError for what is no DeepSpeed engine."""
    if not isinstance(engine, DeepSpeedEngine):
        raise UserError(
            f"attach takes a DeepSpeedEngine, got {type(engine).__name__}; pass what deepspeed.initialize returned"
        )


def has_optimizer(engine: Any) -> bool:
    """Whether a ZeRO-3 engine can train; without an optimizer its weights are only gathered."""
    return type(engine.optimizer).__name__ != "DeepSpeedZeRoOffload"


def has_resumed(engine: Any) -> bool:
    """Whether an engine has loaded a checkpoint that it goes on from, and not only weights to begin with."""
    # Set by every load but one of the module alone, of which DeepSpeed takes no counters.
    return engine.loaded_checkpoint_mp_world_size is not None


def _engine_reasons(engine: Any) -> Iterator[str]:
    if type(engine) is not DeepSpeedEngine:
        yield (
            f"the engine is a {type(engine).__name__}, and subclasses of DeepSpeedEngine may move weights in ways the "
            "mask does not follow; use the plain ZeRO-3 engine (no pipeline module, no hybrid_engine)"
        )
    stage = engine.zero_optimization_stage()
    if stage != 3:
        yield stage_problem(stage, engine._config._param_dict)
    elif not has_optimizer(engine):
        yield "the engine has no optimizer, so there is nothing to hold; give one to deepspeed.initialize"
    elif type(engine.optimizer) is not DeepSpeedZeroOptimizer_Stage3:
        yield (
            f"the ZeRO-3 optimizer is {type(engine.optimizer).__name__}, and the mask acts in "
            f"{DeepSpeedZeroOptimizer_Stage3.__name__} only; turn off what replaces it (super_offload in "
            "offload_optimizer is the usual one)"
        )
    if hasattr(engine.module, ENGINE_ATTRIBUTE):
        yield (
            f"the module has an attribute {ENGINE_ATTRIBUTE!r}, which the engine passes on, and engine."
            f"{ENGINE_ATTRIBUTE} is isolation's handle; rename the module's"
        )
    if engine.is_deepcompile_enabled():
        yield "DeepCompile replaces the gradient hooks that isolation observes; set compile.deepcompile: false"
    if engine.has_moe_layers:
        yield "expert parallelism partitions experts over their own group; use a model without deepspeed.moe layers"
    if engine.zero_quantized_weights() or engine.zero_quantized_nontrainable_weights():
        yield (
            "quantized weights are not covered yet; set zero_quantized_weights and zero_quantized_nontrainable_weights "
            "to false"
        )
    if engine.use_node_local_storage():
        yield (
            "checkpoints on node-local disks are not covered yet: a rank verifies the files of all; set "
            "checkpoint.use_node_local_storage: false"
        )
    if engine.checkpoint_engine is not None and engine.checkpoint_engine.is_decoupled():
        yield (
            "checkpoints that are written by a process of their own are not covered: a save would end before its files "
            "are whole; remove checkpoint.writer"
        )
    if not engine.managed_gradient_accumulation():
        yield "unmanaged gradient accumulation is not covered yet; set managed_gradient_accumulation: true"


def _optimizer_reasons(optimizer: Any, config: EPIConfig) -> Iterator[str]:
    base = optimizer.optimizer
    if optimizer.zenflow:
        yield "ZenFlow replaces the step that isolation acts in; remove zero_optimization.zenflow"
    if optimizer.use_muon:
        yield "Muon writes updates into the gradient buffers before the norm; use an Adam optimizer"
    if optimizer.torch_autocast_gradscaler is not None:
        yield "torch autocast in fp16 may skip a step after the commit point; use bf16, or ds_config's fp16 section"
    if optimizer.master_weights_and_grads_dtype != torch.float32:
        yield (
            f"master weights are {optimizer.master_weights_and_grads_dtype}, and holding the bits of rounded weights "
            "proves nothing; remove fp16/bf16_master_weights_and_gradients"
        )
    if (
        optimizer.model_parallel_group is not None
        and torch.distributed.get_world_size(optimizer.model_parallel_group) > 1
    ):
        yield "tensor parallelism is not covered: a mask would differ between the copies; set its size to 1"
    if optimizer.sequence_parallel_size > 1:
        yield "sequence parallelism is not covered yet; set sequence_parallel_size: 1"
    if config.apply is Apply.REDUCTION:
        yield from _reduction_reasons(base)
    if config.anchor is not None and config.anchor.pull is Pull.GRADIENT and not is_adam(base):
        yield anchor_optimizer_problem(type(base).__name__)
    if config.state is StateFormat.ADAM:
        yield from _adam_reasons(base)
        if optimizer.offload_optimizer and optimizer.partial_offload != 1.0:
            yield adam_state_ratio_problem(optimizer.partial_offload)
        if optimizer.swap_optimizer:
            yield adam_state_nvme_problem()
    if config.policy is PolicyName.MOMENTUM:
        if not is_adam(base):
            yield momentum_optimizer_problem(type(base).__name__)
        if optimizer.swap_optimizer:
            yield momentum_nvme_problem()


def _history_reasons(engine: Any, config: EPIConfig) -> Iterator[str]:
    if has_resumed(engine) and config.missing_state is MissingState.ERROR:
        yield (
            f"the engine has loaded a checkpoint already (it is at step {engine.global_steps}), whose importance and "
            "masks only an engine with isolation loads: nothing would be held, and the next save would lose them; "
            "attach before load_checkpoint, as epi_ds.initialize does, or set missing_state: fresh to begin without "
            "them"
        )


def _reduction_reasons(base: Any) -> Iterator[str]:
    if not is_adam(base):
        yield reduction_optimizer_problem(type(base).__name__)
        return
    if any(group.get("amsgrad") for group in base.param_groups):
        yield "apply: reduction does not know the running maximum of amsgrad; set amsgrad: false or use apply: update"
    if any(group["weight_decay"] and adds_decay_to_gradient(base, group) for group in base.param_groups):
        yield (
            f"{type(base).__name__} adds weight decay to the gradient, so its moments hold decay that importance does "
            "not know, and a released entry would jump; use AdamW, weight_decay 0 or apply: update"
        )


def _adam_reasons(base: Any) -> Iterator[str]:
    if not is_adam(base):
        yield adam_state_optimizer_problem(type(base).__name__)
        return
    if any(group["weight_decay"] and adds_decay_to_gradient(base, group) for group in base.param_groups):
        yield (
            f"{type(base).__name__} adds weight decay to the gradient, so its second moments measure decay too; use "
            "AdamW, weight_decay 0, or state: u8"
        )


def is_adam(base: Any) -> bool:
    """Whether an optimizer is an Adam whose moments are known."""
    return type(base) in ADAM_FAMILY


def adds_decay_to_gradient(base: Any, group: dict[str, Any]) -> bool:
    """Whether an Adam decays the weights of a parameter group through their gradient."""
    if isinstance(base, (FusedAdam, DeepSpeedCPUAdam)):
        return not base.adam_w_mode
    # A setting of the group, and of torch's Adam only in the older releases, where AdamW is a class apart.
    return type(base) is not torch.optim.AdamW and not group.get("decoupled_weight_decay", False)
