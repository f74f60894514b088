"""Isolation for Hugging Face and TRL trainers: ``callbacks=[EPICallback()]``, and nothing else changes."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from epi_ds.api import attach
from epi_ds.config import SECTION, EPIConfig, parse_config
from epi_ds.errors import UserError
from epi_ds.zero3.guard import has_optimizer
from epi_ds.zero3.handle import EPI


class EPICallback(TrainerCallback):
    """Attaches isolation to the ZeRO-3 engine that the trainer makes.

    The trainer (through accelerate) calls ``deepspeed.initialize`` when training starts and loads a checkpoint right
    after that, before any callback sees the engine. So the callback waits for that one call: the engine is attached the
    moment it exists, and a resumed run gets its importance and masks back with the rest of the checkpoint.
    """

    def __init__(self, config: EPIConfig | Mapping[str, Any] | None = None) -> None:
        """``config`` None reads the ``epi`` section of the trainer's DeepSpeed configuration."""
        self._config = None if config is None else parse_config(config, place="the EPICallback configuration")
        self._engine: Any = None

    @property
    def epi(self) -> EPI:
        """The handle of the attached engine. Raises RuntimeError before training has started."""
        if self._engine is None:
            raise RuntimeError("no engine is attached yet: EPICallback attaches when training starts")
        handle: EPI = self._engine.epi
        return handle

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check the configuration and wait for the engine. Raises ValueError for what cannot work."""
        plugin = getattr(args, "deepspeed_plugin", None)
        if plugin is None:
            raise UserError(
                "EPICallback needs DeepSpeed ZeRO-3: pass deepspeed=... to the training arguments, and start the "
                "script with the deepspeed launcher"
            )
        if args.auto_find_batch_size:
            raise UserError(
                "auto_find_batch_size makes a new engine when memory runs out, and what was important to the first "
                "would be lost; set per_device_train_batch_size instead"
            )
        section = plugin.deepspeed_config.get(SECTION)
        if self._config is None and section is None:
            raise UserError(
                f'EPICallback has no configuration: pass one, or add an "{SECTION}" section to the DeepSpeed config'
            )
        if section is not None:
            given, self._config = self._config, parse_config(section)
            if given is not None and given != self._config:
                raise UserError(
                    f'EPICallback was given a configuration, and the "{SECTION}" section of the DeepSpeed '
                    "configuration says something else; keep one of them"
                )
        _wait_for_engine(self, kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the engine which trains is the attached one, on all ranks, and that a mask will be active.

        Raises RuntimeError where training would silently not be isolated or not be distributed.
        """
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if args.world_size != ranks:
            raise RuntimeError(
                f"the trainer sees {args.world_size} processes and there are {ranks} ranks: every rank would train on "
                "the same rows. Start the script with the deepspeed launcher; on the CPU also build the training "
                "arguments with **epi_ds.train.accelerate_setup.prepare_accelerate()"
            )
        trained = getattr(kwargs.get("optimizer"), "optimizer", None)
        if self._engine is None or trained is not self._engine.optimizer:
            raise RuntimeError(
                "the engine that trains was made without EPICallback: pass the callback to the trainer's constructor "
                "(add_callback is too late), and a model instead of model_init"
            )
        self.epi.check_planned_steps(state.max_steps)

    def _attach(self, engine: Any) -> None:
        attach(engine, self._config)
        self._engine = engine


# Callbacks whose trainer has not made its engine yet. Neither is kept alive: some trainers never train.
_waiting: list[tuple[weakref.ref[EPICallback], weakref.ref[Any]]] = []
_deepspeed_initialize = deepspeed.initialize


def _wait_for_engine(callback: EPICallback, model: Any) -> None:
    _waiting.append((weakref.ref(callback), weakref.ref(model)))
    deepspeed.initialize = _initialize


def _initialize(*args: Any, **kwargs: Any) -> Any:
    """Stand in for ``deepspeed.initialize`` while a callback waits, and attach the engine of its model."""
    made = _deepspeed_initialize(*args, **kwargs)
    engine = made[0]
    for entry in list(_waiting):
        callback, model = (reference() for reference in entry)
        if callback is None or model is None:
            _waiting.remove(entry)
        # Evaluating before training makes an engine without an optimizer, and the one that trains comes later.
        elif model is engine.module and has_optimizer(engine):
            _waiting.remove(entry)
            callback._attach(engine)
    if not _waiting:
        deepspeed.initialize = _deepspeed_initialize
    return made
