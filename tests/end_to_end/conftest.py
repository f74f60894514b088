"""Runs that several tests only look at, once for all of them: the demo, a short recipe, a plain script."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from epi_ds.demo.run import DemoFolder
from tests.end_to_end.recipes import RANKS, write_recipe
from tests.support.forks import epi_ds, run_module
from tests.support.once import made_once
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
    return demo_of(tmp_path_factory, "demo", *SHORT_DEMO, "--base-steps", "60")


@pytest.fixture(scope="session")
def whole_demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Run the demo as the Makefile does."""
    return demo_of(tmp_path_factory, "whole_demo")


def demo_of(factory: pytest.TempPathFactory, name: str, *arguments: str) -> Demo:
    """Return the demo of some arguments, which is run once. To be read only."""

    def make(folder: Path) -> None:
        output = checked(run_epi_ds("demo", *arguments, "--output", str(folder / "run"), timeout=900))
        (folder / "output").write_text(output)

    folder = made_once(factory, name, make)
    return Demo(folder / "run", (folder / "output").read_text())


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

    def make(folder: Path) -> None:
        checked(epi_ds("train", str(recipe_of(folder)), num_ranks=RANKS))

    return made_once(tmp_path_factory, "undisturbed", make) / "run"


@pytest.fixture(scope="session")
def plain_script(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of plain_sft.py, which nobody stops. To be read only."""

    def make(folder: Path) -> None:
        checked(run_module("tests.end_to_end.plain_sft", str(small_base), str(folder), num_ranks=2))

    return made_once(tmp_path_factory, "plain_script", make)
