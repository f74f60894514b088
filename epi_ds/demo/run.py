"""The demonstration: pretrain a small model, fine-tune it in three stages, have it stop on the way, resume it."""

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

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils.logging import disable_progress_bar

from epi_ds.data.skills import SKILLS
from epi_ds.demo.base_model import pretrain_small_model
from epi_ds.errors import RemedyError
from epi_ds.launch.local import start_child
from epi_ds.launch.stop_signals import REQUEUE_EXIT_CODE
from epi_ds.recipe.loading import load_recipe
from epi_ds.recipe.models import Recipe
from epi_ds.train.run_folder import RunFolder

RECIPE = "demo"
# Enough to know all five skills a little and two of them well, in about a minute.
BASE_STEPS = 600
# Of all steps, from where on it is told to stop: in the second of three stages, with masks in force.
_INTERRUPT_FROM_SHARE = 0.4
_POLL_SECONDS = 0.2


def run_demo(output: Path, console: Console, *, overrides: Sequence[str] = (), base_steps: int = BASE_STEPS) -> None:
    """Run the shipped demo recipe into ``output``; what an earlier demo left there is thrown away.

    overrides   as ``epi-ds train`` takes them
    base_steps  how long the small model is pretrained

    Raises RemedyError when the run fails, or ends before it could be interrupted.
    """
    disable_progress_bar()
    folder, base = RunFolder(output), output / "base"
    folder.clear()
    shutil.rmtree(base, ignore_errors=True)
    overrides = [*overrides, f"output={output}", f"model.path={base}"]
    recipe = load_recipe(RECIPE, overrides)
    _use_cpu_without_enough_devices(recipe.ranks or 1, console)
    console.print(f"[bold]1/3[/] pretraining a small Llama on {len(SKILLS)} skills, so that it has something to forget")
    _pretrain(base, base_steps, console)
    command = [sys.executable, "-m", "epi_ds.cli.main", "train", RECIPE, *overrides]
    console.print("[bold]2/3[/] fine-tuning in stages with evolving isolation; told to stop on the way")
    _interrupt_after_checkpoint(command, folder, console, first_step=int(_INTERRUPT_FROM_SHARE * _steps_of(recipe)))
    console.print("[bold]3/3[/] the same command again: it resumes from the newest complete checkpoint")
    if exit_code := start_child(command).wait():
        raise RemedyError(f"the resumed run failed with exit code {exit_code}; its output is above")


def _use_cpu_without_enough_devices(ranks: int, console: Console) -> None:
    found = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if 0 < found < ranks:
        console.print(f"{found} device for {ranks} ranks: the demo runs on the CPU", highlight=False)
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")


def _steps_of(recipe: Recipe) -> int:
    """Return about how many steps a recipe of skills trains."""
    batch: int = recipe.train["per_device_train_batch_size"] * (recipe.ranks or 1)
    return sum((one.rows or 0) * stage.epochs for stage in recipe.stages for one in stage.sources) // batch


def _pretrain(folder: Path, steps: int, console: Console) -> None:
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

        pretrain_small_model(folder, skills=tuple(SKILLS), steps=steps, batch_size=16, report=report)


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
