"""The arguments of TRL's trainer that a recipe's ``train`` makes, but for those of ranks and of DeepSpeed."""

from __future__ import annotations

from typing import Any

from epi_ds.recipe.models import Recipe
from epi_ds.train.resume import DEFAULT_ARGUMENTS
from epi_ds.train.run_folder import RunFolder


def sft_arguments(recipe: Recipe, folder: RunFolder) -> dict[str, Any]:
    """Return what ``SFTConfig`` is made of, without ``deepspeed``."""
    given = {name: value for name, value in recipe.train.items() if name != "deepspeed"}
    return {
        **DEFAULT_ARGUMENTS,
        **given,
        "output_dir": str(folder.checkpoints),
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "eval_strategy": "no",
    }
