"""An inspection as one JSON object."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from epi_ds.inspect.inspection import Inspection


def as_json(found: Inspection) -> dict[str, Any]:
    """Return everything that is known, by the names of the fields; what is unknown or not finite is null.

    A threshold of null isolates nothing where masks were selected (``facts.refreshes``).
    """
    return {field.name: _plain(getattr(found, field.name)) for field in fields(found)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
