"""Isolation for Hugging Face and TRL trainers: ``callbacks=[EPICallback()]``, and nothing else changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import deepspeed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from epi_ds.api import SECTION, attach
from epi_ds.config import EPIConfig, parse_config
from epi_ds.errors import UserError
from epi_ds.zero3.handle import EPI


class EPICallback(TrainerCallback):
    """Attaches isolation to the ZeRO-3 engine that the trainer makes.

    The trainer (through accelerate) calls ``deepspeed.initialize`` when training starts and loads a checkpoint right
    after that, before any callback sees the engine. So the callback stands in for that one call: the engine is attached
    the moment it exists, and a resumed run gets its importance and masks back with the rest of the checkpoint.
    """

    def __init__(self, config: EPIConfig | Mapping[str, Any] | None = None) -> None:
        """``config`` None reads the ``epi`` section of the trainer's DeepSpeed configuration."""
        self._config = None if config is None else parse_config(config, place="the EPICallback configuration")
        self._initialize: Any = None
        self._epi: EPI | None = None

    @property
    def epi(self) -> EPI:
        """The handle of the attached engine. Raises RuntimeError before training has started."""
        if self._epi is None:
            raise RuntimeError("no engine is attached yet: EPICallback attaches when training starts")
        return self._epi

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check the configuration and wait for the engine."""
        plugin = getattr(args, "deepspeed_plugin", None)
        if plugin is None:
            raise UserError(
                "EPICallback needs DeepSpeed ZeRO-3: pass deepspeed=... to the training arguments, and start the "
                "script with the deepspeed launcher"
            )
        section = plugin.deepspeed_config.get(SECTION)
        if self._config is None and section is None:
            raise UserError(
                f'EPICallback has no configuration: pass one, or add an "{SECTION}" section to the DeepSpeed config'
            )
        configs = [c for c in (self._config, section and parse_config(section)) if c]
        if len(configs) == 2 and configs[0] != configs[1]:
            raise UserError(
                f'EPICallback was given a configuration, and the "{SECTION}" section of the DeepSpeed configuration '
                "says something else; keep one of them"
            )
        self._config = configs[0]
        self._wait_for_engine_of(kwargs["model"])

    def _wait_for_engine_of(self, model: Any) -> None:
        original = deepspeed.initialize

        def initialize(*args: Any, **kwargs: Any) -> Any:
            made = original(*args, **kwargs)
            # Another trainer's model is not ours, and evaluating before training makes an engine without an optimizer.
            if kwargs.get("model") is model and hasattr(made[1], "optimizer"):
                self._stop_waiting()
                self._epi = attach(made[0], self._config)
            return made

        self._initialize = original
        deepspeed.initialize = initialize

    def _stop_waiting(self) -> None:
        if self._initialize is not None:
            deepspeed.initialize = self._initialize
            self._initialize = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that an engine was attached and that a mask will be active in the run."""
        self._stop_waiting()
        self.epi.check_planned_steps(state.max_steps)
