"""Make Hugging Face's trainer train ZeRO-3 on all ranks, on the CPU too. `EPICallback` proves that it does."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import accelerate
from deepspeed.utils import groups
from torch.distributed.distributed_c10d import _set_pg_timeout

from epi_ds.launch.environment import accelerator_name, is_rank

DEFAULT_TIMEOUT_SECONDS = 1800.0


def prepare_accelerate(*, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> dict[str, Any]:
    """Start the process group the way accelerate's DeepSpeed support wants it; return the training arguments it needs.

    Before training arguments are built. On the CPU three things are needed together: ``use_cpu`` would silently train
    plain DDP, and without the configured state accelerate believes in a single process, so that every rank would train
    on the same rows.

    timeout_seconds  how long a collective waits for a rank that is behind; transformers calls it ``ddp_timeout``, and
                     applies it only where it makes the process group itself. It holds for ZeRO-3's collectives too
    """
    if not is_rank():
        raise RuntimeError("a recipe runs inside ranks; start it with epi-ds train or the deepspeed launcher")
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    timeout = timedelta(seconds=timeout_seconds)
    if accelerator_name() == "cpu":
        # On a machine with GPUs accelerate would move the batches there, away from DeepSpeed's weights.
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
        accelerate.PartialState(backend="gloo", timeout=timeout)
        arguments = {"accelerator_config": {"use_configured_state": True}, "dataloader_pin_memory": False}
    else:
        accelerate.PartialState(timeout=timeout)
        arguments = {}
    # ZeRO-3 gathers and reduces over a copy of the default group, which DeepSpeed makes with torch's own time-out.
    _set_pg_timeout(timeout, groups._clone_world_group())
    return arguments
