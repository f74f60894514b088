"""Runs of recipes in ranks that are there already: when they save and score. tests/end_to_end has the command's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from epi_ds.checkpoint.commit import Run
from epi_ds.recipe.loading import load_recipe
from epi_ds.train.run import run_recipe
from epi_ds.train.start import Start
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.zero3

# Batches of 8 rows. The first stage's epochs are two and a half steps each, the second's two.
EPOCH_ENDS, STAGE_ENDS = [3, 5, 7], [5, 7]
EVERY = 3


def recipe_in(folder: Path, base: Path) -> str:
    recipe = {
        "model": {"path": str(base), "dtype": "float32"},
        "stages": [
            {"name": "sums", "data": {"skill": "arithmetic", "rows": 20}, "epochs": 2},
            {"name": "code", "data": {"skill": "code", "rows": 16}},
        ],
        "method": {"epi": {"ratio": 0.1, "refresh_interval": 2}},
        "train": {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "save_strategy": "epoch",
            "logging_strategy": "epoch",
            "max_length": 128,
            "deepspeed": "cpu",
        },
        "evaluation": {"rows": 2, "max_new_tokens": 2, "every": EVERY},
        "output": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def train(recipe: str, until: str | None) -> list[int]:
    """Run a recipe; return the steps at which a checkpoint became whole, in order."""
    saved, completed = [], Run.completed

    def note(run: Run, path: Path, *, step: int, **others: Any) -> None:
        saved.append(step)
        completed(run, path, step=step, **others)

    Run.completed = note  # type: ignore[method-assign]
    try:
        run_recipe(load_recipe(recipe), Start(until=until))
    finally:
        Run.completed = completed  # type: ignore[method-assign]
        # The next call in these ranks makes engines of its own.
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state(reset_partial_state=True)
    return saved


def lines_of(run: Path, event: str) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


@pytest.mark.slow
def test_stages_have_epochs_and_evaluations_of_their_own(small_base: Path, tmp_path: Path) -> None:
    recipe, run = recipe_in(tmp_path, small_base), tmp_path / "run"
    # Once at every end, also where the trainer's own epoch is left in the middle.
    assert run_ranks(train, 2, recipe, "sums") == [[3, 5]] * 2
    # As a process leaves it that is told to end at step 3: saved, and not yet scored.
    shutil.rmtree(run / "checkpoints" / "checkpoint-5")
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if not line.startswith('{"event": "evaluation", "step": 3')))
    assert run_ranks(train, 2, recipe, None) == [[5, 7]] * 2
    assert sorted(path.name for path in (run / "checkpoints").glob("checkpoint-*")) == [
        f"checkpoint-{step}" for step in EPOCH_ENDS
    ]
    assert [line["step"] for line in lines_of(run, "step")] == EPOCH_ENDS
    evaluations = [(line["step"], line["stage"], line["stage_ended"]) for line in lines_of(run, "evaluation")]
    # No step twice: the sixth and the ends of stages are scored once.
    assert evaluations == [
        (0, "start", True),
        (3, "sums", False),
        (5, "sums", True),
        (6, "code", False),
        (7, "code", True),
    ]
