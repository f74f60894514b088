"""A dry run makes model and engine of many ranks in one process, and refuses what they would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from epi_ds.errors import UserError
from epi_ds.recipe.loading import parse_recipe
from epi_ds.recipe.models import Recipe
from epi_ds.train.validation.dry_run import dry_run
from tests.support.few_words import save_few_words

RANKS = 64


def recipe_of(folder: Path, deepspeed: Any) -> Recipe:
    values = {
        "model": {"path": str(save_few_words(folder / "model"))},
        "stages": [{"name": "one", "data": {"skill": "logic", "rows": 8}}],
        "method": {"epi": {"ratio": 0.1}},
        "train": {"deepspeed": deepspeed, "bf16": True},
        "output": str(folder / "run"),
    }
    return parse_recipe(values, place="the recipe")


@pytest.mark.slow
def test_an_engine_of_64_ranks_has_a_64th_of_the_model_on_each(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "zero3")
    made = dry_run(recipe, ranks=RANKS)
    sizes = [one.numel() for one in AutoModelForCausalLM.from_pretrained(recipe.model.path).parameters()]
    assert made.num_parameters == sum(sizes) == 2448
    # Every parameter is cut into equal parts, the last of them padded.
    assert made.partition_numel == sum(-(-size // RANKS) for size in sizes) == 41
    # u16 is two bytes, a mask a bit.
    assert 2 * 41 <= made.isolation_bytes < 1024
    # fp32 weights and two moments.
    assert made.checkpoint_bytes == RANKS * (12 * made.partition_numel + made.isolation_bytes)
    assert made.refresh_bytes > 0


@pytest.mark.slow
def test_what_an_engine_refuses_is_refused_without_ranks(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"preset": "zero3", "checkpoint.use_node_local_storage": True})
    with pytest.raises(UserError, match="checkpoints on node-local disks are not covered yet"):
        dry_run(recipe, ranks=RANKS)
