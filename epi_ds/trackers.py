"""Experiment trackers go on with the run that an earlier process of the same folder began."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

# What was set here, so that a second trainer of this process does not write into the first one's run.
_set: dict[str, str] = {}


def continue_runs(trackers: Collection[str], folder: Path, *, run_id: str) -> None:
    """Set the variables by which trackers find the run of ``folder``. What the user has set is kept.

    trackers  as ``report_to`` names them, ``all`` included; others than wandb, swanlab and tensorboard are left alone
    run_id    of the folder, see checkpoint/run.py

    TensorBoard's is read when a trainer is constructed, the others' when it begins to train.
    """
    wanted: dict[str, str] = {}
    for name in ("wandb", "swanlab"):
        if name in trackers or "all" in trackers:
            # "allow": begin the run where there is none of this id yet.
            wanted |= {f"{name.upper()}_RUN_ID": run_id, f"{name.upper()}_RESUME": "allow"}
    if "tensorboard" in trackers or "all" in trackers:
        wanted["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    for name, value in wanted.items():
        if os.environ.get(name) == _set.get(name):
            os.environ[name] = _set[name] = value
