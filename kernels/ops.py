"""The operations as torch knows them: a schema each, what it means for shapes, and an implementation by device."""

from __future__ import annotations

import torch
from epi_ds.kernels.cpu import observe as cpu_observe
from epi_ds.kernels.dispatch import Backend, backend_of
from epi_ds.kernels.reference import observe as reference_observe
from epi_ds.kernels.reference.codecs import Stored
from torch import Tensor

_operations = torch.library.Library("epi_ds", "DEF")  # type: ignore[no-untyped-call]
_operations.define(  # type: ignore[no-untyped-call]
    "observe_(Tensor(a!) codes, Tensor(b!) scales, int first_index, Tensor? gradient, float ema_decay, "
    "float inverse_scale, int key, int step) -> ()"
)


def observe_(
    stored: Stored,
    gradient: Tensor | None,
    *,
    ema_decay: float,
    inverse_scale: float = 1.0,
    key: int = 0,
    step: int = 0,
) -> None:
    """Update a run of importance in place from the raw gradient. See `epi_ds.kernels.reference.observe`."""
    torch.ops.epi_ds.observe_(*stored, gradient, ema_decay, inverse_scale, key, step)


def _observe_anywhere(
    codes: Tensor,
    scales: Tensor,
    first_index: int,
    gradient: Tensor | None,
    ema_decay: float,
    inverse_scale: float,
    key: int,
    step: int,
) -> None:
    stored = Stored(codes, scales, first_index)
    observe = cpu_observe.observe_ if backend_of(codes) is Backend.CPU else reference_observe.observe_
    observe(stored, gradient, ema_decay=ema_decay, inverse_scale=inverse_scale, key=key, step=step)


def _observe_of_shapes(
    codes: Tensor,
    scales: Tensor,
    first_index: int,
    gradient: Tensor | None,
    ema_decay: float,
    inverse_scale: float,
    key: int,
    step: int,
) -> None:
    """Change nothing: only values would."""


_operations.impl("observe_", _observe_anywhere, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("epi_ds::observe_", _observe_of_shapes, lib=_operations)
