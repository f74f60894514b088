"""Isolation for hand-written DeepSpeed loops: `initialize` and `attach`."""

from __future__ import annotations

import base64
import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import deepspeed
import hjson

from epi_ds import ds_configs
from epi_ds.checkpoint.store import load_masks
from epi_ds.combinations import combination_problems
from epi_ds.config import SECTION, EPIConfig, parse_config
from epi_ds.ds_configs.values import auto_keys
from epi_ds.errors import UserError, nearest, summarize
from epi_ds.zero3.attach import attach as attach_to_engine
from epi_ds.zero3.attach import detach
from epi_ds.zero3.guard import check_is_engine
from epi_ds.zero3.handle import EPI

# Read once: what others put in its place later may take any arguments.
_SIGNATURE = inspect.signature(deepspeed.initialize)
# Sections in which ``auto`` is a value of their own: exchange, and DeepSpeed's keep_in_fp32_modules.
_OWN_AUTO = (SECTION, "data_types")


def read_section(ds_config: Any) -> EPIConfig:
    """Return the validated ``epi`` section of a ds_config: a mapping, a path, the name of a shipped one, or base64.

    Raises ValueError when there is none, when it goes with nothing that the rest of the ds_config says, or listing
    everything that is wrong with it.
    """
    return _section_of(_load(ds_config))


def _section_of(given: _Given) -> EPIConfig:
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
    """A DeepSpeed configuration, and the file or shipped one that it was read from."""

    values: Mapping[str, Any]
    source: str | None = None

    @property
    def place(self) -> str:
        """What messages call its ``epi`` section."""
        return f'the "{SECTION}" section of {self.source or "ds_config"}'


def _load(ds_config: Any) -> _Given:
    if not isinstance(ds_config, (str, os.PathLike)):
        return _Given(ds_config if isinstance(ds_config, Mapping) else {})
    text = os.fspath(ds_config)
    if os.path.isfile(text) or ds_configs.is_shipped(text):
        return _Given(ds_configs.load(text), text)
    try:
        values = hjson.loads(base64.urlsafe_b64decode(text).decode())
    except ValueError:
        values = None
    if not isinstance(values, Mapping):
        names = ds_configs.names()
        raise UserError(
            f"ds_config {text!r} is neither a file, nor one of the shipped configurations ({', '.join(names)}), nor a "
            f"configuration in base64{nearest(text, names)}"
        )
    return _Given(values)


def _check_is_filled(given: _Given) -> None:
    """Raise UserError for values that are ``auto``: for DeepSpeed bf16 is off there, and nothing says so."""
    keys = list(auto_keys({key: value for key, value in given.values.items() if key not in _OWN_AUTO}))
    if keys:
        name = "NAME" if given.source is None else f'"{given.source}"'
        changes = "".join(f'    "{key}": ...,\n' for key in keys)
        raise UserError(
            f'{given.source or "ds_config"} leaves to the Hugging Face trainer what is "auto" there, and this is none; '
            f"give the values:\n  config=epi_ds.ds_config({name}, {{\n{changes}  }})"
        )


@contextmanager
def _config_of(namespace: Any, config: Any) -> Iterator[None]:
    """Let ``args.deepspeed_config`` be what was read, while DeepSpeed looks at it."""
    kept, namespace.deepspeed_config = namespace.deepspeed_config, config
    try:
        yield
    finally:
        namespace.deepspeed_config = kept


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """Mirror ``deepspeed.initialize`` and attach isolation as the ``epi`` section of the config says. Collective.

    Takes and returns exactly what ``deepspeed.initialize`` does, and as a configuration also the name of a shipped one
    (`epi_ds.ds_config`); the engine has a handle, ``engine.epi``. The section is validated before anything is
    allocated, and a ValueError lists the values that are still ``auto``.
    """
    arguments = _SIGNATURE.bind(*args, **kwargs).arguments
    key = next((key for key in ("config", "config_params") if arguments.get(key) is not None), None)
    namespace = arguments.get("args")
    given = _load(getattr(namespace, "deepspeed_config", None) if key is None else arguments[key])
    _check_is_filled(given)
    config = _section_of(given)
    # What was checked is what DeepSpeed gets, which knows no names and no environment variables.
    if key is None:
        with _config_of(namespace, given.values):
            engine, optimizer, loader, scheduler = deepspeed.initialize(*args, **kwargs)
    else:
        engine, optimizer, loader, scheduler = deepspeed.initialize(**{**arguments, key: given.values})
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
