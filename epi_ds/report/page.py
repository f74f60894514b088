"""report.html: one page, no network, from a run's metrics only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_report(metrics: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Write the page."""
    path.write_text("<html></html>")
