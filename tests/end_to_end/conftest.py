"""One demo per session: its model, its run and its output are what several tests look at."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.processes import checked, run_epi_ds


class Demo(NamedTuple):
    """A finished ``epi-ds demo``."""

    folder: Path
    output: str


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Run the demo as the Makefile does, into a folder of its own."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    return Demo(folder, checked(run_epi_ds("demo", "--output", str(folder), timeout=900)))
