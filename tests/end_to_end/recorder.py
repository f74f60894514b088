"""Runs in ranks: ``epi-ds train`` with a recorder around every micro-batch, and death at a given step.

    recorder.py RECIPE FOLDER [DIE_AT_STEP]

Writes FOLDER/rank_R.jsonl, a line per micro-batch: the optimizer steps finished, the rows of tokens this rank trains on
(without padding), and how much momentum one parameter has before it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.utils import safe_get_full_optimizer_state
from epi_ds.launch.environment import prepare_environment

from epi_ds.train.recipe import load_recipe
from epi_ds.train.run import run_recipe
from epi_ds.train.trainer import StageTrainer


def record(folder: Path, die_at: int | None) -> None:
    """Wrap the trainer's step. Everything else is what ``epi-ds train`` runs."""
    original = StageTrainer.training_step

    def training_step(trainer: Any, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        step = trainer.state.global_step
        if step == die_at:
            os._exit(1)  # as a killed rank: nothing is flushed, saved or taken down
        momentum = 0.0
        if step > 0:  # Adam makes its moments in the first step
            watched = dict(trainer.model.named_parameters())["model.layers.0.mlp.down_proj.weight"]
            momentum = float(safe_get_full_optimizer_state(watched, "exp_avg").abs().sum())
        line = {
            "step": step,
            "rows": [
                row[keep.bool()].tolist()
                for row, keep in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
            ],
            "momentum": momentum,
        }
        with (folder / f"rank_{dist.get_rank()}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return original(trainer, model, inputs, *rest)

    StageTrainer.training_step = training_step  # type: ignore[method-assign]


if __name__ == "__main__":
    prepare_environment()
    record(Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
    run_recipe(load_recipe(sys.argv[1], []))
    dist.barrier()
    dist.destroy_process_group()
