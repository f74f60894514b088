"""A recipe as a person reads it: without the settings that are defaults, and none the less the same recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from epi_ds.defaults import without_defaults
from epi_ds.recipe.models import Recipe
from epi_ds.recipe.presets import with_preset


def brief(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is no default of a recipe's values, as JSON has them with all defaults. Nothing is validated.

    A default stays where it is given against something else: a preset, or what follows from keeping importance.
    """
    short, method = without_defaults(Recipe, values), values["method"]
    against: dict[str, Any] = {}
    if method.get("preset") is not None:
        against = with_preset({"preset": method["preset"]})
    if (method.get("keep") or {}).get("importance"):
        against = {**against, "epi": {**against.get("epi", {}), "memory": None, "protects": None}}
    if against:
        _give(short["method"], method, against)
    return short


def _give(short: dict[str, Any], values: Mapping[str, Any], against: Mapping[str, Any]) -> None:
    """Give every setting of ``against`` its value, in the sections that there are."""
    for name, other in against.items():
        if isinstance(other, Mapping) and isinstance(values.get(name), Mapping):
            _give(short.setdefault(name, {}), values[name], other)
        elif name in values:
            short[name] = values[name]
