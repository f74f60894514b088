"""Runs in ranks: ``epi-ds train`` of a recipe, in which the last rank hears SIGUSR1 during a given step.

stop_at.py RECIPE STEP
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch.distributed as dist

from epi_ds.launch.environment import prepare_environment
from epi_ds.recipe.loading import load_recipe
from epi_ds.train.run import run_recipe
from epi_ds.train.trainer import StageTrainer


def stop_at(step: int) -> None:
    """Wrap the trainer's step. Everything else is what ``epi-ds train`` runs."""
    original = StageTrainer.training_step

    def training_step(trainer: Any, *arguments: Any) -> Any:
        if trainer.state.global_step + 1 == step and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(trainer, *arguments)

    StageTrainer.training_step = training_step  # type: ignore[method-assign]


if __name__ == "__main__":
    prepare_environment()
    stop_at(int(sys.argv[2]))
    run_recipe(load_recipe(sys.argv[1], []))
