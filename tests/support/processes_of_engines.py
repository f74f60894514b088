"""Engines of one process that are to be those of several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from epi_ds.checkpoint import commit, seats


@contextmanager
def another_process() -> Iterator[None]:
    """Let engines act as in another process, which knows nothing of what this one holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit, "_held", {})
        patch.setattr(seats, "_seats", {})
        yield
