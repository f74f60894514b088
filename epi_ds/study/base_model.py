"""A small Llama that knows its skills, one for every seed and set: ``python -m epi_ds.study.base_model``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def pretrain(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the model that ``settings`` describe, see `cells.base_settings`; whole or absent also after a kill."""
    from epi_ds.data.rendering import Learnt
    from epi_ds.demo.base_model import pretrain_small_model

    steps, width = settings["steps"], settings["hidden_size"]

    def report(step: int, loss: float) -> None:
        if step % 100 == 0 or step == steps:
            print(f"pretraining step {step}/{steps}  loss {loss:.3f}", flush=True)

    pretrain_small_model(
        folder,
        skills=settings["skills"],
        steps=steps,
        learnt=Learnt.EVERYTHING,
        batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        rows_per_skill=settings["rows"],
        seed=settings["seed"],
        report=report,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=settings["num_hidden_layers"],
    )


if __name__ == "__main__":
    pretrain(Path(sys.argv[1]), json.loads(sys.argv[2]))
