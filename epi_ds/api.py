"""Isolation for hand-written DeepSpeed loops: `initialize` and `attach`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import deepspeed

from epi_ds.checkpoint.store import FileStateStore, load_masks
from epi_ds.config import EPIConfig, parse_config
from epi_ds.errors import UserError
from epi_ds.zero3.attach import attach as attach_to_engine
from epi_ds.zero3.handle import EPI

SECTION = "epi"


def read_section(ds_config: Any) -> EPIConfig:
    """Return the validated ``epi`` section of a ds_config, given as a mapping or as the path of a JSON file.

    Raises ValueError when there is none, or listing everything that is wrong with it.
    """
    place = f'the "{SECTION}" section of ds_config'
    if isinstance(ds_config, (str, os.PathLike)):
        place = f'the "{SECTION}" section of {os.fspath(ds_config)}'
        with open(ds_config) as file:
            ds_config = json.load(file)
    if not isinstance(ds_config, Mapping) or SECTION not in ds_config:
        raise UserError(
            f'{place} is missing; add a top-level "{SECTION}" key (not inside "zero_optimization"), for example '
            f'{{"{SECTION}": {{"ratio": 0.01, "refresh_interval": 500}}}}'
        )
    return parse_config(ds_config[SECTION], place=place)


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """Mirror ``deepspeed.initialize`` and attach isolation as the ``epi`` section of the config says. Collective.

    Takes and returns exactly what ``deepspeed.initialize`` does; the engine has a handle, ``engine.epi``.
    The section is validated before anything is allocated.
    """
    ds_config = kwargs.get("config")
    if ds_config is None:
        ds_config = kwargs.get("config_params")
    if ds_config is None and kwargs.get("args") is not None:
        ds_config = getattr(kwargs["args"], "deepspeed_config", None)
    config = read_section(ds_config)
    engine, optimizer, loader, scheduler = deepspeed.initialize(*args, **kwargs)
    attach(engine, config)
    return engine, optimizer, loader, scheduler


def attach(engine: Any, config: EPIConfig | Mapping[str, Any] | None = None) -> EPI:
    """Attach isolation to a ZeRO-3 engine that exists; return its handle, which is also ``engine.epi``. Collective.

    config  the settings; None reads the ``epi`` section of the engine's own configuration

    The engine's ``save_checkpoint`` and ``load_checkpoint`` then carry the isolation state. Raises ValueError for an
    engine that isolation cannot act on, saying what to set instead; the engine is then unchanged.
    """
    parsed = read_section(engine._config._param_dict) if config is None else parse_config(config)
    epi = attach_to_engine(engine, parsed, state_store=FileStateStore())
    if parsed.mask_from is not None:
        load_masks(parsed.mask_from, epi.controller)
    return epi
