"""Runs in ranks: ``epi-ds train`` with a recorder around every micro-batch, and death at a given step.

    recorder.py RECIPE FOLDER [DIE_AT_STEP]

Writes FOLDER/rank_R.jsonl, a line per micro-batch: the optimizer steps finished, the rows of tokens this rank trains on
(without padding), and how much momentum one parameter has before it. RECORDER_SECONDS makes every micro-batch of a run
that begins so much longer; one that goes on is as quick as ever.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from epi_ds.launch import stop_signals

# As `epi-ds train` does, before what takes seconds.
stop_signals.listen()

import torch.distributed as dist  # noqa: E402
from deepspeed.utils import safe_get_full_optimizer_state  # noqa: E402

from epi_ds.launch.environment import prepare_environment  # noqa: E402
from epi_ds.recipe.loading import load_recipe  # noqa: E402
from epi_ds.train.run import run_recipe  # noqa: E402
from epi_ds.train.trainer import StageTrainer  # noqa: E402


def record(folder: Path, die_at: int | None) -> None:
    """Wrap the trainer's step. Everything else is what ``epi-ds train`` runs."""
    original = StageTrainer.training_step
    first_step: int | None = None

    def training_step(trainer: Any, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        nonlocal first_step
        step = trainer.state.global_step
        first_step = step if first_step is None else first_step
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
        if first_step == 0:
            time.sleep(float(os.environ.get("RECORDER_SECONDS", "0")))
        return original(trainer, model, inputs, *rest)

    StageTrainer.training_step = training_step  # type: ignore[method-assign]


if __name__ == "__main__":
    prepare_environment()
    record(Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
    run_recipe(load_recipe(sys.argv[1], []))
    dist.barrier()
    dist.destroy_process_group()
