"""Runs that several tests only look at, once per session: the demo, a short recipe, a plain script."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from epi_ds.demo.run import DemoFolder
from tests.end_to_end.recipes import RANKS, write_recipe
from tests.support.forks import epi_ds, run_module
from tests.support.processes import checked, run_epi_ds


class Demo(NamedTuple):
    """A finished ``epi-ds demo``."""

    folder: Path
    output: str

    @property
    def protected(self) -> Path:
        """The run that was stopped and resumed."""
        return DemoFolder(self.folder).protected


# A tenth of the shipped demo's steps; its windows are shorter too, so that a mask is active in as many of them.
SHORT_DEMO = (
    "stages.arithmetic.data.rows=640",
    *(f"method.keep.data.{source}.rows=16" for source in range(2)),
    "method.epi.refresh_interval=5",
    "train.save_steps=3",
    "evaluation.rows=8",
)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Run the demo into a folder of its own, all of its ways, with fewer rows than are shipped."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    return Demo(
        folder, checked(run_epi_ds("demo", *SHORT_DEMO, "--base-steps", "60", "--output", str(folder), timeout=900))
    )


@pytest.fixture(scope="session")
def whole_demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Run the demo as the Makefile does."""
    folder = tmp_path_factory.mktemp("whole_demo") / "run"
    return Demo(folder, checked(run_epi_ds("demo", "--output", str(folder), timeout=900)))


@pytest.fixture(scope="session")
def recipe_of(small_base: Path) -> Callable[[Path], Path]:
    """Writes a short recipe into a folder."""

    def write(folder: Path) -> Path:
        evaluation = {"rows": 6, "max_new_tokens": 4}
        train = {"save_steps": 100, "report_to": "tensorboard"}
        return write_recipe(folder, small_base, evaluation=evaluation, train=train)

    return write


@pytest.fixture(scope="session")
def undisturbed(recipe_of: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the short recipe that nobody stops. To be read only."""
    folder = tmp_path_factory.mktemp("undisturbed")
    checked(epi_ds("train", str(recipe_of(folder)), num_ranks=RANKS))
    return folder / "run"


@pytest.fixture(scope="session")
def plain_script(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of plain_sft.py, which nobody stops. To be read only."""
    folder = tmp_path_factory.mktemp("plain_script")
    checked(run_module("tests.end_to_end.plain_sft", str(small_base), str(folder), num_ranks=2))
    return folder
