"""A model as it is held now, and how what is asked of it is batched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from epi_ds.evaluation.scores import Scored


class HeldModel(NamedTuple):
    """A model that can be called now, with whole weights or with those that ZeRO-3 fetches in every forward."""

    model: Any
    tokenizer: Any
    device: torch.device
    gathered: bool
    """Whether this process has all weights. Otherwise all ranks run the same number of forwards."""
    batch_size: int
    """Most rows of a batch."""
    batch_tokens: int
    """Most tokens of a batch, padding included: their logits are the largest tensor of all."""
    show: Callable[[Scored], None]
    """Called before each of this process's batches."""
