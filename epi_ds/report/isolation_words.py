"""Settings of isolation as pages say them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def ratio_told(ratio: float | str | Mapping[str, Any]) -> str:
    """Say the ratio, or from where to where a schedule takes it."""
    if isinstance(ratio, str):
        return ratio
    return f"{ratio['start']:.2%} to {ratio['end']:.2%}" if isinstance(ratio, Mapping) else f"{ratio:.2%}"


def interval_told(config: Mapping[str, Any]) -> str:
    """Say how often masks are refreshed, or looked at."""
    interval = config["refresh_interval"]
    return f"looked at every {config['check_interval']} steps" if isinstance(interval, str) else f"{interval} steps"
