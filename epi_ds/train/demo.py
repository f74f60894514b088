"""The demonstration: pretrain a small model, fine-tune it in three stages, interrupt it, resume it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from epi_ds.train.base_model import pretrain_small_model
from epi_ds.train.recipe import load_recipe
from epi_ds.train.run_folder import RunFolder

RECIPE = "demo"
# What the model knows before it is fine-tuned, and may forget.
BASE_SKILLS = ("code", "logic")
_BASE_STEPS = 300
_POLL_SECONDS = 0.2


def run_demo(output: Path, console: Console) -> None:
    """Run the shipped demo recipe into ``output``, whose content is thrown away.

    Raises RuntimeError when the run fails, or ends before it could be interrupted.
    """
    shutil.rmtree(output, ignore_errors=True)
    base = output / "base"
    load_recipe(RECIPE, [f"output={output}", f"model.path={base}"])
    console.print(f"[bold]1/3[/] pretraining a small Llama on {' and '.join(BASE_SKILLS)}: something to forget")
    _pretrain(base, console)
    command = [
        sys.executable,
        "-m",
        "epi_ds.cli.main",
        "train",
        RECIPE,
        f"output={output}",
        f"model.path={base}",
    ]
    console.print("[bold]2/3[/] fine-tuning in stages with evolving isolation; interrupted on the way")
    _interrupt_after_checkpoint(command, RunFolder(output), console)
    console.print("[bold]3/3[/] the same command again: it resumes from the newest complete checkpoint")
    finished = subprocess.run(command)
    if finished.returncode:
        raise RuntimeError(f"the resumed run failed with exit code {finished.returncode}; its output is above")


def _pretrain(folder: Path, console: Console) -> None:
    with Progress(
        TextColumn("pretraining"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=_BASE_STEPS, loss=float("nan"))

        def report(step: int, loss: float) -> None:
            progress.update(task, completed=step, loss=loss)
            if not console.is_terminal and step % 50 == 0:
                console.print(f"pretraining step {step}/{_BASE_STEPS}  loss {loss:.3f}", highlight=False)

        pretrain_small_model(folder, skills=BASE_SKILLS, steps=_BASE_STEPS, batch_size=16, report=report)


def _interrupt_after_checkpoint(command: list[str], folder: RunFolder, console: Console) -> None:
    """Start the run and terminate it some steps after its second complete checkpoint."""
    process = subprocess.Popen(command)
    while process.poll() is None and len(folder.committed_checkpoints()) < 2:
        time.sleep(_POLL_SECONDS)
    if process.poll() is not None:
        raise RuntimeError(f"the run ended with exit code {process.returncode} before it could be interrupted")
    step = folder.committed_checkpoints()[-1].step
    # Let it train on, so that the interruption costs steps and the resume has something to repeat.
    time.sleep(2.0)
    process.send_signal(signal.SIGTERM)
    process.wait()
    console.print(f"interrupted after checkpoint {step}", highlight=False)
