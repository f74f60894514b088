"""Isolation for hand-written DeepSpeed loops: `initialize` and `attach`."""

from __future__ import annotations

import base64
import inspect
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import deepspeed
import hjson

from epi_ds.checkpoint.store import load_masks
from epi_ds.combinations import combination_problems
from epi_ds.config import SECTION, EPIConfig, parse_config
from epi_ds.errors import UserError, summarize
from epi_ds.zero3.attach import attach as attach_to_engine
from epi_ds.zero3.attach import detach
from epi_ds.zero3.guard import check_is_engine
from epi_ds.zero3.handle import EPI

# Read once: what others put in its place later may take any arguments.
_SIGNATURE = inspect.signature(deepspeed.initialize)


def read_section(ds_config: Any) -> EPIConfig:
    """Return the validated ``epi`` section of a ds_config in any form that DeepSpeed reads: mapping, path or base64.

    Raises ValueError when there is none, when it goes with nothing that the rest of the ds_config says, or listing
    everything that is wrong with it.
    """
    given = _load(ds_config)
    if SECTION not in given.values:
        raise UserError(
            f'{given.place} is missing; add a top-level "{SECTION}" key (not inside "zero_optimization"), for example '
            f'{{"{SECTION}": {{"ratio": 0.01, "refresh_interval": 500}}}}'
        )
    config = parse_config(given.values[SECTION], place=given.place)
    problems = combination_problems(given.values, config)
    if problems:
        raise UserError(summarize(problems, place=f"{given.place}, with the rest of it"))
    return config


class _Given(NamedTuple):
    """A DeepSpeed configuration, and what to call its section in messages."""

    values: Mapping[str, Any]
    place: str


def _load(ds_config: Any) -> _Given:
    place = f'the "{SECTION}" section of ds_config'
    if isinstance(ds_config, (str, os.PathLike)):
        text = os.fspath(ds_config)
        if os.path.exists(text):
            place = f'the "{SECTION}" section of {text}'
            with open(text) as file:
                # DeepSpeed's own parser: comments are allowed.
                ds_config = hjson.load(file)
        else:
            try:
                ds_config = hjson.loads(base64.urlsafe_b64decode(text).decode())
            except ValueError:
                raise UserError(f"ds_config {text!r} is neither a file nor a configuration in base64") from None
    return _Given(ds_config if isinstance(ds_config, Mapping) else {}, place)


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """Mirror ``deepspeed.initialize`` and attach isolation as the ``epi`` section of the config says. Collective.

    Takes and returns exactly what ``deepspeed.initialize`` does; the engine has a handle, ``engine.epi``.
    The section is validated before anything is allocated.
    """
    given = _SIGNATURE.bind(*args, **kwargs).arguments
    candidates = (given.get("config"), given.get("config_params"), getattr(given.get("args"), "deepspeed_config", None))
    config = read_section(next((c for c in candidates if c is not None), None))
    engine, optimizer, loader, scheduler = deepspeed.initialize(*args, **kwargs)
    attach(engine, config)
    return engine, optimizer, loader, scheduler


def attach(engine: Any, config: EPIConfig | Mapping[str, Any] | None = None) -> EPI:
    """Attach isolation to a ZeRO-3 engine that exists; return its handle, which is also ``engine.epi``. Collective.

    config  the settings; None reads the ``epi`` section of the engine's own configuration

    The engine's ``save_checkpoint`` and ``load_checkpoint`` then carry the isolation state. Raises ValueError for an
    engine that isolation cannot act on, saying what to set instead, and RuntimeError for files of ``mask_from`` that
    cannot be read; the engine is then unchanged.
    """
    check_is_engine(engine)
    parsed = read_section(engine._config._param_dict) if config is None else parse_config(config)
    epi = attach_to_engine(engine, parsed)
    if parsed.mask_from is not None:
        try:
            load_masks(parsed.mask_from, epi.controller)
        except Exception:
            detach(engine)
            raise
    return epi
