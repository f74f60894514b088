"""Named settings of ``method``, for who wants to choose one thing and not twenty: ``method.preset``."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any


class Preset(StrEnum):
    """A named set of settings. What each costs and buys stands in docs/recipes.md."""

    PAPER = "paper"
    BALANCED = "balanced"
    STRONG = "strong"
    DATA_FREE = "data_free"


# Anchors are pulled towards where a stage began: to the run's first weights, a later stage would undo the earlier ones.
_SETTINGS: Mapping[Preset, Mapping[str, Any]] = {
    # arXiv 2604.14010, section 5.1.
    Preset.PAPER: {"epi": {"policy": "evolving", "ratio": 0.01, "refresh_interval": 500, "ema_decay": 0.99}},
    # A few own rows in every batch, and a pull that leaves about half of the way.
    Preset.BALANCED: {
        "keep": {"self": 512, "importance": False, "replay": 0.05},
        "epi": {"policy": "none", "anchor": {"strength": 2, "to": "stage"}},
    },
    # More of both, the pull by importance on own rows, and its most important entries held.
    Preset.STRONG: {
        "keep": {"self": 512, "replay": 0.1},
        "epi": {
            "policy": "evolving",
            "ratio": 0.05,
            "memory": "stage_max",
            "protects": "past",
            "anchor": {"strength": 4, "to": "stage", "weight": "importance"},
        },
    },
    # The weights alone: no rows are written, read or measured.
    Preset.DATA_FREE: {"epi": {"policy": "none", "anchor": {"strength": 4, "to": "stage"}}},
}


# What belongs to the policy of a preset, and says nothing of another one.
_OF_THE_POLICY = ("ratio", "refresh_interval", "ema_decay")
# What a preset has because importance is kept.
_OF_WHAT_IS_REMEMBERED = ("memory", "protects")


def with_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of ``method`` with those of its preset below them: a key that is given is as it is given.

    A section that is given as null is left out, and so is what the preset sets for the sake of a setting that is given
    otherwise: ``ratio`` of another policy, ``strength`` beside ``decay``, memory where nothing is kept. An unknown
    preset is left to the validation, which names those there are.
    """
    name = values.get("preset")
    if name not in list(Preset):
        return dict(values)
    return _over(_without_what_given_replaces(_SETTINGS[Preset(name)], values), values)


def _without_what_given_replaces(preset: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what a preset sets for the sake of another of its settings that is given otherwise."""
    epi, given_epi = dict(preset.get("epi", {})), given.get("epi", {})
    if not isinstance(given_epi, Mapping):
        return dict(preset)
    anchor, given_anchor = dict(epi.get("anchor", {})), given_epi.get("anchor", {})
    if given_epi.get("policy", epi.get("policy")) != epi.get("policy"):
        for name in _OF_THE_POLICY:
            epi.pop(name, None)
    if isinstance(given_anchor, Mapping) and given_anchor.get("decay") is not None:
        anchor.pop("strength", None)
    keep = given.get("keep", preset.get("keep"))
    if keep is None or (isinstance(keep, Mapping) and keep.get("importance") is False):
        for name in _OF_WHAT_IS_REMEMBERED:
            epi.pop(name, None)
        anchor.pop("weight", None)
    return {**preset, "epi": {**epi, **({"anchor": anchor} if anchor else {})}}


def _over(below: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in given.items():
        under = merged.get(key)
        merged[key] = _over(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return merged
