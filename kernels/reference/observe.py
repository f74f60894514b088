"""Importance from one gradient: ``S <- d*S + (1-d) * g*g`` (eq. 5 of arXiv 2604.14010)."""

from __future__ import annotations

import torch
from epi_ds.kernels.reference.chunks import chunks
from epi_ds.kernels.reference.codecs import Stored, decode, encode_
from torch import Tensor


def observe_(
    stored: Stored,
    gradient: Tensor | None,
    *,
    ema_decay: float,
    inverse_scale: float = 1.0,
    key: int = 0,
    step: int = 0,
) -> None:
    """Update a run of importance in place from the raw gradient.

    stored         mutated; a uint8 run must begin and end where its storage does
    gradient       [numel]  any float dtype, same device, untouched; None stands for a gradient of zero
    ema_decay      weight of the old value
    inverse_scale  multiplies the gradient first: 1 / loss scale
    key, step      what stochastic rounding is drawn from; see [Note: dither] in dither.py

    ``g*g`` saturates at the largest finite value of the format. An entry whose gradient is NaN counts as zero, so that
    no non-finite value ever enters the state.
    """
    largest = torch.finfo(torch.float32).max
    first = stored.first_index
    # Cut at multiples of the global index, which are borders of uint8 blocks.
    for start, stop in chunks(first, first + stored.codes.numel()):
        piece = stored.piece(start - first, stop - first)
        values = decode(piece).mul_(ema_decay)
        if gradient is not None:
            scaled = gradient[start - first : stop - first].float() * inverse_scale
            squared = torch.nan_to_num_(scaled.square_(), nan=0.0, posinf=largest)
            # Two roundings may lift d*max + (1-d)*max above the largest finite value: clamp again.
            values.add_(squared.mul_(1.0 - ema_decay)).clamp_(max=largest)
        encode_(piece, values, key=key, step=step)
