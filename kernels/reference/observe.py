"""Importance from one gradient: ``S <- d*S + (1-d) * g*g`` (eq. 5 of arXiv 2604.14010)."""

from __future__ import annotations

import torch
from epi_ds.kernels.reference.chunks import chunks
from torch import Tensor


def observe_(importance: Tensor, gradient: Tensor | None, *, ema_decay: float, inverse_scale: float = 1.0) -> None:
    """Update ``importance`` in place from the raw gradient.

    importance     [numel]  fp32, mutated
    gradient       [numel]  any float dtype, same device, untouched; None stands for a gradient of zero
    ema_decay      weight of the old value
    inverse_scale  multiplies the gradient first: 1 / loss scale

    ``g*g`` saturates at the largest finite fp32 value. An entry whose gradient is NaN counts as zero, so that no
    non-finite value ever enters the state.
    """
    if gradient is None:
        importance.mul_(ema_decay)
        return
    largest = torch.finfo(torch.float32).max
    for start, stop in chunks(0, importance.numel()):
        scaled = gradient[start:stop].float() * inverse_scale
        squared = torch.nan_to_num_(scaled.square_(), nan=0.0, posinf=largest)
        piece = importance[start:stop]
        # Two roundings may lift d*max + (1-d)*max above the largest finite value: clamp again.
        piece.mul_(ema_decay).add_(squared, alpha=1.0 - ema_decay).clamp_(max=largest)
