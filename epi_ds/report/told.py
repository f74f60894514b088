"""Numbers as people read them."""

from __future__ import annotations

from typing import Any

NOTHING = "\N{EN DASH}"
"""Stands where nothing is known."""


def percent(value: float | None, *, digits: int = 1) -> str:
    """Say a share."""
    return NOTHING if value is None else f"{value:.{digits}%}"


def number(value: float | None) -> str:
    """Say a number by four digits."""
    return NOTHING if value is None else f"{value:.4g}"


def score(value: float | None, *, is_accuracy: bool) -> str:
    """Say an accuracy in percent, and anything else by three decimals."""
    if value is None:
        return NOTHING
    return f"{value:.1%}" if is_accuracy else f"{value:.3f}"


def difference(value: float | None, *, is_accuracy: bool) -> str:
    """Say by how much a score changed: an accuracy in points of percent."""
    if value is None:
        return NOTHING
    # Nothing is neither more nor less.
    said = f"{100 * value:+.1f} points" if is_accuracy else f"{value:+.3f}"
    return said.replace("-", "\N{MINUS SIGN}") if float(said.split()[0]) else said[1:]


def seconds(value: float | None) -> str:
    """Say how long something took."""
    if value is None:
        return NOTHING
    for unit, length in (("h", 3600), ("min", 60)):
        if value >= 2 * length:
            return f"{value / length:,.1f} {unit}"
    return f"{value:.3g} s" if value < 100 else f"{value:.0f} s"


def size(value: float | None) -> str:
    """Say a number of bytes."""
    if value is None:
        return NOTHING
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= length:
            return f"{value / length:.3g} {unit}"
    return f"{value:.0f} bytes"


def setting(value: Any) -> str:
    """Say a setting's value as a recipe has it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(setting, value))}]"
    return str(value)
