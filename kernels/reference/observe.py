"""Importance from one gradient: ``S <- d*S + (1-d) * g*g`` (eq. 5 of arXiv 2604.14010), and unscaling of that gradient.

[Note: one pass] ZeRO-3 multiplies the whole gradient partition by ``1 / (loss scale * clipping)`` right before the
optimizer's step. Importance is measured at the same place from the same numbers, so one pass does both: the gradient is
read and written as it would be anyway, and what isolation adds is one read and write of the importance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epi_ds.kernels.reference.chunks import chunks
from epi_ds.kernels.reference.codecs import Stored
from epi_ds.kernels.reference.decode import decode
from epi_ds.kernels.reference.encode import encode_
from epi_ds.kernels.reference.runs import runs_of


def observe_(
    codes: Tensor,
    scales: Tensor,
    gradient: Tensor | None,
    table: Tensor,
    *,
    ema_decay: float,
    inverse_scale: float = 1.0,
    rescale: float = 1.0,
    step: int = 0,
) -> None:
    """Update the importance of a flat partition in place from its raw gradient, then unscale that.

    See [Note: one pass].

    codes          float32, bfloat16, uint16 or uint8, mutated where a run says
    scales         fp32, mutated with uint8 codes; empty otherwise
    gradient       any float dtype, same device; float32 if ``rescale`` is not 1; None stands for a gradient of zero
    table          runs of the gradient (see `epi_ds.kernels.reference.runs`), which must cover what is to be unscaled;
                   a uint8 run must begin and end where the storage of its parameter does
    ema_decay      weight of the old value
    inverse_scale  multiplies the gradient before it is squared: 1 / loss scale
    rescale        multiplies the gradient in place afterwards, of entries without importance too
    step           what stochastic rounding is drawn from; see [Note: dither] in dither.py

    ``g*g`` saturates at the largest finite value of the format. An entry whose gradient is NaN counts as zero, so that
    no non-finite value ever enters the state.
    """
    for run in runs_of(table):
        own = None if gradient is None else gradient[run.start : run.start + run.numel]
        if run.first_code >= 0:
            stored = run.stored_in(codes, scales)
            observe_run_(stored, own, ema_decay=ema_decay, inverse_scale=inverse_scale, key=run.key, step=step)
        if own is not None and rescale != 1.0:
            own.mul_(rescale)


def observe_run_(
    stored: Stored, gradient: Tensor | None, *, ema_decay: float, inverse_scale: float, key: int, step: int
) -> None:
    """`observe_` of the one run that ``stored`` is, without unscaling."""
    largest = torch.finfo(torch.float32).max
    first = stored.first_index
    # Cut at multiples of the global index, which are borders of uint8 blocks.
    for start, stop in chunks(first, first + stored.codes.numel()):
        part = stored.part(start - first, stop - first)
        values = decode(part).mul_(ema_decay)
        if gradient is not None:
            scaled = gradient[start - first : stop - first].float() * inverse_scale
            squared = torch.nan_to_num_(scaled.square_(), nan=0.0, posinf=largest)
            # Two roundings may lift d*max + (1-d)*max above the largest finite value: clamp again.
            values.add_(squared.mul_(1.0 - ema_decay)).clamp_(max=largest)
        encode_(part, values, key=key, step=step)
