"""Ready ZeRO-3 configurations, found by name: ``zero3``, ``zero3_offload``."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from epi_ds.errors import UserError, nearest


def names() -> list[str]:
    """Return the names of the shipped configurations."""
    return sorted(
        entry.name.removesuffix(".json") for entry in files(__name__).iterdir() if entry.name.endswith(".json")
    )


def load(name_or_path: str) -> dict[str, Any]:
    """Load a shipped configuration by name, or a JSON file by path. Raises ValueError for neither."""
    path = Path(name_or_path)
    if path.suffix == ".json" and path.is_file():
        text = path.read_text()
    elif name_or_path in names():
        text = files(__name__).joinpath(f"{name_or_path}.json").read_text()
    else:
        raise UserError(
            f"deepspeed: {name_or_path!r} is neither a JSON file nor one of the shipped configurations "
            f"({', '.join(names())}){nearest(name_or_path, names())}"
        )
    loaded: dict[str, Any] = json.loads(text)
    return loaded
