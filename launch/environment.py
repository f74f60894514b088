"""The environment that DeepSpeed processes of this installation run in."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def is_rank() -> bool:
    """Whether this process is one of several ranks already, whoever started it."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def prepare_environment() -> None:
    """Set, in this process and for its children, what DeepSpeed reads from the environment. Keeps what is set.

    Imports torch. Call it before anything imports DeepSpeed, which reads its environment once.
    """
    # Two releases of ninja do not read each other's logs, so the second one to come by rebuilds every operator: the
    # environment's own must be found first, also when the environment was not activated.
    own_programs = str(Path(sys.prefix) / "bin")
    if own_programs not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(filter(None, [own_programs, os.environ.get("PATH")]))
    # Operators built for this environment's torch; the default folder is shared by all environments of a user.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    import torch

    if "DS_ACCELERATOR" not in os.environ and not torch.accelerator.is_available():
        # DeepSpeed's own detection warns when it cannot tell.
        os.environ["DS_ACCELERATOR"] = "cpu"


def cache_folder() -> Path:
    """Return where what can be made anew is kept: ``EPI_DS_CACHE``, or the user's own cache."""
    chosen = os.environ.get("EPI_DS_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "epi_ds"


def accelerator_name() -> str:
    """Return the accelerator DeepSpeed uses. Imports DeepSpeed."""
    from deepspeed.accelerator import get_accelerator

    return str(get_accelerator().device_name())


def default_ranks() -> int:
    """Return how many ranks to start on this machine: one per accelerator, or one without any. Imports torch."""
    return num_accelerators() or 1


def num_accelerators() -> int:
    """Return how many accelerators this process sees. Imports torch."""
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0
