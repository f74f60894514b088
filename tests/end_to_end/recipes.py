"""The recipe that most tests of runs train, and what is compared of its runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from epi_ds.checkpoint.manifest import Manifest

RANKS = 2
MICRO_BATCH = 2
ACCUMULATION = 2
# Global batches of 8 rows: 5 (two epochs of 20 rows), 5 and 4 steps.
STAGE_ROWS = {"reset": 40, "carry": 43, "chat": 32}
TOTAL_STEPS = 14


def write_recipe(folder: Path, base: Path, **changes: Any) -> Path:
    """Write a recipe of three stages over three forms of data into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    table, chat = folder / "table.jsonl", folder / "chat.json"
    table.write_text(
        "".join(
            json.dumps({"question": f"What is {i}?", "answer": f"A {i}."}) + "\n" for i in range(STAGE_ROWS["carry"])
        )
    )
    turns = [
        [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"{i}"}]
        for i in range(STAGE_ROWS["chat"])
    ]
    chat.write_text(json.dumps([{"talk": turn} for turn in turns]))
    columns = {"prompt": "question", "completion": "answer"}
    recipe: dict[str, Any] = {
        "model": {"path": str(base), "dtype": "float32"},
        "stages": [
            {
                "name": "reset",
                "data": {"skill": "arithmetic", "rows": STAGE_ROWS["reset"] // 2},
                "epochs": 2,
                "warmup_steps": 2,
            },
            {
                "name": "carry",
                "data": {"path": str(table), "source": "table", **columns},
                "evaluation": {"path": str(table), **columns, "metric": "loss", "rows": 20},
                "moments": "carry",
                "learning_rate": 1e-3,
                "lr_scheduler_type": "constant",
            },
            {
                "name": "chat",
                "data": {"path": str(chat), "source": "chat", "messages": "talk"},
                "moments": "reset",
                "lr_scheduler_type": "cosine",
            },
        ],
        "method": {"epi": {"ratio": 0.1, "refresh_interval": 3, "ema_decay": 0.9, "memory": "per_task"}},
        "train": {
            "per_device_train_batch_size": MICRO_BATCH,
            "gradient_accumulation_steps": ACCUMULATION,
            "learning_rate": 3e-4,
            "save_steps": 3,
            "max_length": 128,
            "seed": 3,
        },
        # Three batches of each of two skills, and three of a loss: every rank but one has one less.
        "evaluation": {"skills": ["logic"], "rows": 24, "batch_size": 8, "max_new_tokens": 24, "weights": "gathered"},
        "output": str(folder / "run"),
        "ranks": RANKS,
    }
    recipe = {
        key: {**value, **changes.pop(key, {})} if isinstance(value, dict) else value for key, value in recipe.items()
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, **changes}, sort_keys=False))
    return path


def lines_of(run: Path, *events: str) -> list[dict[str, Any]]:
    """Return a run's metrics of these events, without what is measured in seconds."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if "seconds" not in key and "per_second" not in key}
        for line in lines
        if line["event"] in events
    ]


def assert_same_files(one: Manifest, other: Manifest, *, but: Sequence[str] = ()) -> None:
    """Compare all files of two checkpoints of a trainer, but some, and those that say which run it was."""
    of_the_run = {f"global_step{one.step}/epi/manifest.json", "trainer_state.json", "recipe.json"}
    assert one.files.keys() == other.files.keys()
    assert len(one.files) > 15
    for name in one.files.keys() - of_the_run - set(but):
        assert one.files[name] == other.files[name], name
