"""The demonstration: a small model learns a new task plainly, and again protected, stopped and resumed on the way."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils.logging import disable_progress_bar

from epi_ds.demo.base_model import pretrain_small_model
from epi_ds.demo.comparison import Comparison, compare, points_of
from epi_ds.demo.plane import plane_figure
from epi_ds.errors import RemedyError
from epi_ds.launch.local import start_child
from epi_ds.launch.stop_signals import REQUEUE_EXIT_CODE
from epi_ds.recipe.loading import load_recipe
from epi_ds.recipe.models import Recipe
from epi_ds.train.run_folder import RunFolder

RECIPE = "demo"
# Enough to know what it is pretrained on well, in about a minute.
BASE_STEPS = 600
_TRAIN = (sys.executable, "-m", "epi_ds.cli.main", "train", RECIPE)
# What is left of the recipe without its protection.
_PLAIN = ("method={epi: {policy: none}}", "train.save_strategy='no'")
# Of all steps, from where on it is told to stop: with masks in force.
_INTERRUPT_FROM_SHARE = 0.4
_POLL_SECONDS = 0.2


class DemoFolder(NamedTuple):
    """Paths inside the folder of a demo."""

    root: Path

    @property
    def base(self) -> Path:
        """The small model that both ways begin with."""
        return self.root / "base"

    @property
    def plain(self) -> Path:
        """The run without protection."""
        return self.root / "plain"

    @property
    def protected(self) -> Path:
        """The run of the recipe."""
        return self.root / "protected"

    @property
    def plane(self) -> Path:
        """The picture of both."""
        return self.root / "plane.svg"


def run_demo(
    output: Path, console: Console, *, overrides: Sequence[str] = (), base_steps: int = BASE_STEPS
) -> Comparison:
    """Run the shipped demo recipe into ``output``, plain and as it is; what an earlier demo left there is thrown away.

    overrides   as ``epi-ds train`` takes them
    base_steps  how long the small model is pretrained

    Raises RemedyError when a run fails, or ends before it could be interrupted.
    """
    disable_progress_bar()
    folder = DemoFolder(output)
    shutil.rmtree(folder.base, ignore_errors=True)
    for run in (folder.plain, folder.protected):
        RunFolder(run).clear()
    overrides = [*overrides, f"model.path={folder.base}"]
    recipe = load_recipe(RECIPE, overrides)
    _use_cpu_without_enough_devices(recipe.ranks or 1, console)
    skills = recipe.evaluation.skills
    console.print(f"[bold]1/4[/] pretraining a small Llama on {', '.join(skills)}: what it must not forget")
    _pretrain(folder.base, skills, base_steps, console)
    stages = ", then ".join(stage.name for stage in recipe.stages)
    console.print(f"[bold]2/4[/] plain fine-tuning on {stages}")
    plain = [*overrides, *_PLAIN, f"output={folder.plain}"]
    _finish([*_TRAIN, *plain])
    console.print("[bold]3/4[/] the same stages, protected; told to stop on the way")
    command = [*_TRAIN, *overrides, f"output={folder.protected}"]
    first_step = int(_INTERRUPT_FROM_SHARE * _steps_of(recipe))
    _interrupt_after_checkpoint(command, RunFolder(folder.protected), console, first_step=first_step)
    console.print("[bold]4/4[/] the same command again: it resumes from the newest complete checkpoint")
    _finish(command)
    comparison = compare(recipe, base=folder.base, plain=folder.plain, protected=folder.protected)
    folder.plane.write_text(plane_figure(points_of(comparison)))
    return comparison


def _finish(command: Sequence[str]) -> None:
    if exit_code := start_child(command).wait():
        raise RemedyError(f"the run ended with exit code {exit_code}; its output is above")


def _use_cpu_without_enough_devices(ranks: int, console: Console) -> None:
    found = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if 0 < found < ranks:
        console.print(f"{found} device for {ranks} ranks: the demo runs on the CPU", highlight=False)
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")


def _steps_of(recipe: Recipe) -> int:
    """Return about how many steps a recipe of skills trains."""
    batch: int = recipe.train["per_device_train_batch_size"] * (recipe.ranks or 1)
    return sum((one.rows or 0) * stage.epochs for stage in recipe.stages for one in stage.sources) // batch


def _pretrain(folder: Path, skills: Sequence[str], steps: int, console: Console) -> None:
    with Progress(
        TextColumn("pretraining"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=steps, loss=float("nan"))

        def report(step: int, loss: float) -> None:
            progress.update(task, completed=step, loss=loss)
            if not console.is_terminal and step % 100 == 0:
                console.print(f"pretraining step {step}/{steps}  loss {loss:.3f}", highlight=False)

        pretrain_small_model(folder, skills=skills, steps=steps, report=report)


def _interrupt_after_checkpoint(command: list[str], folder: RunFolder, console: Console, *, first_step: int) -> None:
    """Start the run and have it stop some steps after a complete checkpoint, not before ``first_step``."""

    def newest() -> int:
        return max((checkpoint.step for checkpoint in folder.complete_checkpoints()), default=0)

    process = start_child(command)
    while process.poll() is None and newest() < first_step:
        time.sleep(_POLL_SECONDS)
    # Let it train on, so that it stops where no checkpoint was due.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1.0)
    if process.poll() is not None:
        raise RemedyError(f"the run ended with exit code {process.returncode} before it could be interrupted")
    process.send_signal(signal.SIGTERM)
    if (exit_code := process.wait()) != REQUEUE_EXIT_CODE:
        raise RemedyError(f"the run ended with exit code {exit_code}, and was to save and stop; its output is above")
    console.print(f"it saved checkpoint {newest()} and stopped", highlight=False)
