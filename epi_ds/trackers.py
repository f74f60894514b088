"""Experiment trackers: whether they are installed, and how they go on with the run that an earlier process began."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection
from pathlib import Path

from epi_ds.errors import UserError

# What was set here, so that a second trainer of this process does not write into the first one's run.
_set: dict[str, str] = {}


# Where the module or the package on PyPI has another name than the tracker: modules, any of which will do, and package.
_MODULES = {
    "azure_ml": (("azureml",), "azureml-core"),
    "comet_ml": (("comet_ml",), "comet-ml"),
    "flyte": (("flytekit",), "flytekit"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
}
# Says where a run reports to, and is itself not installed.
_WITHOUT_MODULE = ("kubeflow",)


def trackers_in(report_to: object) -> list[str]:
    """Return the trackers that a ``report_to`` names, one or several."""
    given = report_to if isinstance(report_to, (list, tuple)) else [report_to]
    return [str(name) for name in given if name not in (None, "none")]


def check_installed(trackers: Collection[str]) -> None:
    """Raise UserError for trackers that are not installed, with the command that installs them.

    ``all`` are those that are. Nothing of them is imported, so that a command may ask before it starts ranks.
    """
    missing = [name for name in trackers if name not in ("all", *_WITHOUT_MODULE) and not _is_installed(name)]
    if missing:
        packages = " ".join(_MODULES[name][1] if name in _MODULES else name for name in missing)
        raise UserError(
            f"train.report_to: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed here: "
            f"pip install {packages}, or remove it"
        )


def _is_installed(tracker: str) -> bool:
    modules = _MODULES[tracker][0] if tracker in _MODULES else (tracker,)
    return any(importlib.util.find_spec(module) is not None for module in modules)


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
