"""What TRL, transformers and DeepSpeed would refuse of a recipe's ``train`` when ranks have started."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
from trl import SFTConfig

from epi_ds.ds_configs.keys import unknown_at_the_top
from epi_ds.errors import Problem
from epi_ds.recipe.arguments import deepspeed_config, read_config
from epi_ds.recipe.models import Recipe
from epi_ds.trackers import check_installed, trackers_in
from epi_ds.train.refusals import refused_by_libraries
from epi_ds.train.run_folder import RunFolder
from epi_ds.train.sft_arguments import sft_arguments
from epi_ds.train.validation.findings import Findings
from epi_ds.zero3.config_check import config_problems

_DEEPSPEED = "train.deepspeed"
# What these ask of a GPU is not to be known without one.
_OF_GPUS = ("bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval")


def check_arguments(recipe: Recipe, findings: Findings) -> SFTConfig | None:
    """Return the trainer's arguments as a rank on the CPU would have them; None where transformers refuses them."""
    with findings.told("train.report_to"):
        check_installed(trackers_in(recipe.train.get("report_to")))
    if not torch.cuda.is_available():
        for name in [name for name in _OF_GPUS if recipe.train.get(name)]:
            findings.unchecked(f"train.{name}", "whether the GPUs that will train can do it: there is none here")
    with findings.told("train"):
        return arguments_on_cpu(recipe)
    return None


def arguments_on_cpu(recipe: Recipe) -> SFTConfig:
    """Return the trainer's arguments without DeepSpeed. Raises UserError for what TRL and transformers refuse."""
    values = sft_arguments(recipe, RunFolder(Path(recipe.output)))
    if not torch.cuda.is_available():
        values.pop("tf32", None)
    with refused_by_libraries():
        return SFTConfig(**values, use_cpu=True)


def check_deepspeed(train: Mapping[str, Any], findings: Findings) -> None:
    """Tell what DeepSpeed would refuse or ignore of the configuration of a ``train`` section, at every level."""
    config = read_config(train).config
    for key in unknown_at_the_top(config):
        findings.warning(f"{_DEEPSPEED}.{key}", "DeepSpeed has no such top-level key, and ignores it")
    for problem in config_problems(config):
        findings.problem(problem.within(_DEEPSPEED))


def check_agreement(recipe: Recipe, args: SFTConfig, findings: Findings, *, ranks: int) -> None:
    """Tell where the DeepSpeed configuration and the arguments say different things, as transformers finds it.

    ranks  that will train: the configuration may give the global batch
    """
    for text in filled_config(recipe, args, ranks=ranks).mismatches:
        findings.problem(
            Problem(
                _DEEPSPEED,
                f'the configuration and train differ ({text.removeprefix("- ")}); give "auto" in the configuration, '
                "which train then fills",
            )
        )


def filled_config(recipe: Recipe, args: SFTConfig, *, ranks: int) -> HfTrainerDeepSpeedConfig:
    """Return the DeepSpeed configuration as transformers fills it, for so many ranks, with what does not agree."""
    filled = HfTrainerDeepSpeedConfig(deepspeed_config(recipe.train))
    filled.trainer_config_process(_of_ranks(args, ranks))
    return filled


def _of_ranks(args: SFTConfig, ranks: int) -> SFTConfig:
    """Return the same arguments as if so many ranks had them."""

    class OfRanks(type(args)):  # type: ignore[misc]
        world_size = property(lambda self: ranks)

    found = OfRanks.__new__(OfRanks)
    found.__dict__.update(args.__dict__)
    return found
