"""The operations as torch knows them: a schema each, what it means for shapes, and an implementation.

[Note: operations] An operation has one name everywhere: `reference/x.py` is what it means, `cpu/x.py` and `cpu/x.cpp`
are the same in C++, `tests/kernels/test_x.py` compares them. Here it is registered, so that torch's compilers and
checkers know what it mutates; `dispatch` decides which implementation runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from epi_ds.kernels.cpu import decode as cpu_decode
from epi_ds.kernels.cpu import observe as cpu_observe
from epi_ds.kernels.cpu import sketch_counts as cpu_sketch_counts
from epi_ds.kernels.dispatch import Backend, backend_of
from epi_ds.kernels.reference import codecs
from epi_ds.kernels.reference import observe as reference_observe
from epi_ds.kernels.reference import sketch_counts as reference_sketch_counts
from epi_ds.kernels.reference.codecs import Stored
from torch import Tensor

_operations = torch.library.Library("epi_ds", "DEF")  # type: ignore[no-untyped-call]


def _register(schema: str, implementation: Callable[..., Any], of_shapes: Callable[..., Any]) -> None:
    """Register an operation by its schema."""
    name = schema.partition("(")[0]
    _operations.define(schema)  # type: ignore[no-untyped-call]
    _operations.impl(name, implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"epi_ds::{name}", of_shapes, lib=_operations)


# --- observe_ ---


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


def _observe(
    codes: Tensor,
    scales: Tensor,
    first_index: int,
    gradient: Tensor | None,
    ema_decay: float,
    inverse_scale: float,
    key: int,
    step: int,
) -> None:
    observe = cpu_observe.observe_ if backend_of(codes) is Backend.CPU else reference_observe.observe_
    stored = Stored(codes, scales, first_index)
    observe(stored, gradient, ema_decay=ema_decay, inverse_scale=inverse_scale, key=key, step=step)


_register(
    "observe_(Tensor(a!) codes, Tensor(b!) scales, int first_index, Tensor? gradient, float ema_decay, "
    "float inverse_scale, int key, int step) -> ()",
    _observe,
    lambda *args: None,
)


# --- decode ---


def decode(stored: Stored) -> Tensor:
    """Return the values of stored importance. [numel] fp32; of float32 codes the storage itself, otherwise new."""
    if stored.codes.dtype is torch.float32:
        return stored.codes
    values: Tensor = torch.ops.epi_ds.decode(*stored)
    return values


def _decode(codes: Tensor, scales: Tensor, first_index: int) -> Tensor:
    stored = Stored(codes, scales, first_index)
    values = cpu_decode.decode(stored) if backend_of(codes) is Backend.CPU else codecs.decode(stored)
    return values.clone() if values is codes else values


_register(
    "decode(Tensor codes, Tensor scales, int first_index) -> Tensor",
    _decode,
    lambda codes, scales, first_index: codes.new_empty(codes.shape, dtype=torch.float32),
)


# --- sketch_counts ---


def sketch_counts(codes: Tensor, edges: Tensor) -> Tensor:
    """Return, for every edge, how many codes are at or above it. See `epi_ds.kernels.reference.sketch_counts`."""
    counts: Tensor = torch.ops.epi_ds.sketch_counts(codes, edges)
    return counts


def _sketch_counts(codes: Tensor, edges: Tensor) -> Tensor:
    if backend_of(codes) is Backend.CPU:
        return cpu_sketch_counts.sketch_counts(codes, edges)
    return reference_sketch_counts.sketch_counts(codes, edges)


_register(
    "sketch_counts(Tensor codes, Tensor edges) -> Tensor",
    _sketch_counts,
    lambda codes, edges: edges.new_empty(edges.shape, dtype=torch.int64),
)
