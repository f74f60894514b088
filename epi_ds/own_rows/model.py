"""The model that writes: its weights gathered once where they fit on every rank, else every token in step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from transformers import GenerationConfig

from epi_ds.evaluation.room import Weights, fits_gathered
from epi_ds.zero3.local_forwards import local_forwards

logger = logging.getLogger(__name__)


class WritingModel(NamedTuple):
    """A model that is ready to generate."""

    model: Any
    device: torch.device
    in_step: bool
    """Whether every forward is collective: all ranks must generate whenever one does."""


@contextmanager
def writing_model(model: Any, *, weights: Weights) -> Iterator[WritingModel]:
    """Yield the model of an engine, or a model with or without partitioned weights, to generate with. Collective.

    Leaves the model in the mode it was in, with its settings of generation, and every random state alone. A model with
    partitioned weights that has no engine and does not fit is given one, and is good for nothing else afterwards.
    """
    engine = model if isinstance(model, deepspeed.DeepSpeedEngine) else None
    module = model if engine is None else engine.module
    device = torch.device(get_accelerator().current_device_name()) if _is_partitioned(module) else module.device
    with ExitStack() as stack:
        in_step = _is_partitioned(module) and not fits_gathered(module, device, weights=weights)
        if in_step:
            _tell("keep weights partitioned and generate in step")
            if engine is None:
                engine, *_ = deepspeed.initialize(model=module, config=_inference_config(module))
        elif _is_partitioned(module):
            _tell("gather the weights once")
            stack.enter_context(_gathered(module, engine))
        kept, was_training = module.generation_config, module.training
        # Its own settings would sample from something else than what the model believes.
        module.generation_config = GenerationConfig()
        module.eval()
        stack.callback(setattr, module, "generation_config", kept)
        stack.callback(module.train, was_training)
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng())
        yield WritingModel(module, device, in_step)


@contextmanager
def _gathered(module: Any, engine: Any) -> Iterator[None]:
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        if engine is None:
            yield
            return
        # Imported here: TRL takes seconds, and a loop of one's own need not have it in its process.
        from trl.models.utils import add_hooks, remove_hooks

        remove_hooks(engine)
        try:
            with local_forwards(engine):
                yield
        finally:
            add_hooks(engine)


def _is_partitioned(module: Any) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def _inference_config(module: Any) -> dict[str, Any]:
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(module.dtype)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        **({} if precision is None else {precision: {"enabled": True}}),
    }


def _tell(what: str) -> None:
    if dist.get_rank() == 0:
        logger.info("own rows %s", what)
