"""Whether the whole model fits on every rank, beside what it is generated with, and how large a batch may be."""

from __future__ import annotations

from typing import Any, Literal

import psutil
import torch
import torch.distributed as dist

Weights = Literal["auto", "gathered", "partitioned"]

# Gathered weights, and as much again for activations and the cache of generated tokens.
_ROOM_FACTOR = 2.0
# Logits of a batch that is scored by its loss, at most, but for a single row that has more: 256 MB in fp32.
_LOGITS = 1 << 26


def fits_gathered(model: Any, device: torch.device, *, weights: Weights) -> bool:
    """Decide, alike on all ranks, whether to gather all weights of a ZeRO-3 model on every one of them now. Collective.

    weights  ``auto`` asks for the free memory
    """
    if weights != "auto":
        return weights == "gathered"
    needed = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = psutil.virtual_memory().available // dist.get_world_size()
    fits = torch.tensor([int(free > _ROOM_FACTOR * needed)], device=device)
    dist.all_reduce(fits, op=dist.ReduceOp.MIN)
    return bool(fits.item())


def most_scored_tokens(config: Any) -> int:
    """Return the most tokens, padding included, of a batch whose logits are read, for a model's configuration."""
    return max(_LOGITS // int(config.get_text_config().vocab_size), 1)
