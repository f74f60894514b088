"""What DeepSpeed would refuse of a configuration when its engine is made, found without an engine and without ranks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError, HybridEngineConfig
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from epi_ds.ds_configs.keys import ignored_in_sections
from epi_ds.errors import Problem, located_problems, nearest

# Sections whose keys DeepSpeed checks by itself.
_MODELS: dict[str, type[DeepSpeedConfigModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "fp16": DeepSpeedFP16Config,
    "bf16": DeepSpeedBF16Config,
    "bfloat16": DeepSpeedBF16Config,
    "comms_logger": CommsLoggerConfig,
    "compile": CompileConfig,
    "hybrid_engine": HybridEngineConfig,
    "tensorboard": TensorBoardConfig,
    "wandb": WandbConfig,
    "csv_monitor": CSVConfig,
    "comet": CometConfig,
}
# Keys by which DeepSpeed chooses among Adams, beside those that they take themselves.
_CHOOSING = ("torch_adam", "adam_w_mode", "max_grad_norm")
_AUTO = "auto"


def config_problems(ds_config: Mapping[str, Any]) -> list[Problem]:
    """Return everything that DeepSpeed would refuse or ignore of a configuration, by its dotted keys.

    But for keys at its top, see `epi_ds.ds_configs.keys.misspelt`. Values that are ``auto`` pass; so do batch sizes,
    which depend on the number of ranks.
    """
    found = [*_section_problems(ds_config), *ignored_in_sections(ds_config), *_adam_problems(ds_config)]
    return found or list(_whole_problems(ds_config))


def _section_problems(ds_config: Mapping[str, Any]) -> Iterator[Problem]:
    for section, model in _MODELS.items():
        given = ds_config.get(section)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            yield Problem(section, f"must be a section of settings, got {given!r}")
            continue
        try:
            model(**{str(key): value for key, value in given.items()})
        except ValidationError as error:
            yield from (problem.within(section) for problem in located_problems(error, model))


def _adam_problems(ds_config: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what no Adam would take: DeepSpeed hands these on, and ranks end in a traceback."""
    optimizer = ds_config.get("optimizer")
    if not isinstance(optimizer, Mapping) or str(optimizer.get("type", "")).lower() not in ("adam", "adamw"):
        return
    params = optimizer.get("params")
    classes = (FusedAdam, DeepSpeedCPUAdam, torch.optim.AdamW)
    taken = {name for one in classes for name in inspect.signature(one.__init__).parameters}
    known = sorted((taken | set(_CHOOSING)) - {"self", "params", "model_params"})
    for key in params if isinstance(params, Mapping) else ():
        if key not in known:
            yield Problem(f"optimizer.params.{key}", f"no Adam takes it{nearest(str(key), known)}")


def _whole_problems(ds_config: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with sections that are right by themselves, as DeepSpeed says it: the first of it."""
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    values = {key: value for key, value in ds_config.items() if key not in batch and value != _AUTO}
    try:
        DeepSpeedConfig({**values, batch[1]: 1})
    except (ValueError, AssertionError, TypeError, DeepSpeedConfigError) as error:
        yield Problem("", f"DeepSpeed refuses it: {' '.join(str(error).split())}")
