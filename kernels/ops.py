"""The operations as torch knows them: a schema each, what it means for shapes, and an implementation.

[Note: operations] An operation has one name everywhere: `reference/x.py` is what it means, `cpu/x.py` and `cpu/x.cpp`
are the same in C++, `gpu/x.py` in Triton, and `tests/kernels/test_x.py` compares them. Here it is registered, so that
torch's compilers and checkers know what it mutates; `dispatch` decides which implementation runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from epi_ds.kernels.dispatch import implementation
from epi_ds.kernels.reference.codecs import Stored

_operations = torch.library.Library("epi_ds", "DEF")  # type: ignore[no-untyped-call]


def _register(schema: str, run: Callable[..., Any], of_shapes: Callable[..., Any] = lambda *args: None) -> None:
    """Register an operation by its schema; by default it returns nothing."""
    name = schema.partition("(")[0]
    _operations.define(schema)  # type: ignore[no-untyped-call]
    _operations.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"epi_ds::{name}", of_shapes, lib=_operations)


# --- observe_ ---


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

    See `epi_ds.kernels.reference.observe`.
    """
    torch.ops.epi_ds.observe_(codes, scales, gradient, table, ema_decay, inverse_scale, rescale, step)


def _observe(
    codes: Tensor,
    scales: Tensor,
    gradient: Tensor | None,
    table: Tensor,
    ema_decay: float,
    inverse_scale: float,
    rescale: float,
    step: int,
) -> None:
    settings = {"ema_decay": ema_decay, "inverse_scale": inverse_scale, "rescale": rescale, "step": step}
    implementation("observe", codes).observe_(codes, scales, gradient, table, **settings)


_register(
    "observe_(Tensor(a!) codes, Tensor(b!) scales, Tensor(c!)? gradient, Tensor table, float ema_decay, "
    "float inverse_scale, float rescale, int step) -> ()",
    _observe,
)


# --- decode, encode_ ---


def decode(stored: Stored) -> Tensor:
    """Return the values of stored importance. [numel] fp32; of float32 codes the storage itself, otherwise new."""
    if stored.codes.dtype is torch.float32:
        return stored.codes
    values: Tensor = torch.ops.epi_ds.decode(*stored)
    return values


def _decode(codes: Tensor, scales: Tensor, first_index: int) -> Tensor:
    values: Tensor = implementation("decode", codes).decode(Stored(codes, scales, first_index))
    return values.clone() if values is codes else values


_register(
    "decode(Tensor codes, Tensor scales, int first_index) -> Tensor",
    _decode,
    lambda codes, scales, first_index: codes.new_empty(codes.shape, dtype=torch.float32),
)


def encode_(stored: Stored, values: Tensor, *, key: int, step: int) -> None:
    """Overwrite stored importance with values, in place. See `epi_ds.kernels.reference.codecs`."""
    torch.ops.epi_ds.encode_(*stored, values, key, step)


def _encode(codes: Tensor, scales: Tensor, first_index: int, values: Tensor, key: int, step: int) -> None:
    implementation("encode", codes).encode_(Stored(codes, scales, first_index), values, key=key, step=step)


_register(
    "encode_(Tensor(a!) codes, Tensor(b!) scales, int first_index, Tensor values, int key, int step) -> ()", _encode
)


# --- sketch_counts ---


def sketch_counts(codes: Tensor, edges: Tensor) -> Tensor:
    """Return, for every edge, how many codes are at or above it. See `epi_ds.kernels.reference.sketch_counts`."""
    counts: Tensor = torch.ops.epi_ds.sketch_counts(codes, edges)
    return counts


_register(
    "sketch_counts(Tensor codes, Tensor edges) -> Tensor",
    lambda codes, edges: implementation("sketch_counts", codes).sketch_counts(codes, edges),
    lambda codes, edges: edges.new_empty(edges.shape, dtype=torch.int64),
)


# --- code_histogram_ ---


def code_histogram_(bins: Tensor, codes: Tensor) -> Tensor:
    """Count 16-bit codes in place; return the smallest and the largest. [2] int64, on the CPU.

    See `epi_ds.kernels.reference.code_histogram`. There is none for GPUs: they read memory faster than they add to the
    few places that codes fall on.
    """
    extremes: Tensor = torch.ops.epi_ds.code_histogram_(bins, codes)
    return extremes


_register(
    "code_histogram_(Tensor(a!) bins, Tensor codes) -> Tensor",
    lambda bins, codes: implementation("code_histogram", codes).code_histogram_(bins, codes),
    lambda bins, codes: torch.empty(2, dtype=torch.int64),
)


# --- masked_sumsq ---


def masked_sumsq(values: Tensor, bits: Tensor, *, first_entry: int = 0) -> Tensor:
    """Return the sum of squares of all entries, and of those that are not isolated. [2] fp64, on the device.

    See `epi_ds.kernels.reference.masked_sumsq`.
    """
    sums: Tensor = torch.ops.epi_ds.masked_sumsq(values, bits, first_entry)
    return sums


_register(
    "masked_sumsq(Tensor values, Tensor bits, int first_entry) -> Tensor",
    lambda values, bits, first_entry: implementation("masked_sumsq", values).masked_sumsq(
        values, bits, first_entry=first_entry
    ),
    lambda values, bits, first_entry: values.new_empty(2, dtype=torch.float64),
)


# --- select_ ---


def select_(bits: Tensor, codes: Tensor, before: Tensor, *, threshold_code: int, first_entry: int) -> Tensor:
    """Write the mask of some neighbouring entries; return how many are isolated, and how many of these were before.

    [2] int64, on the device. See `epi_ds.kernels.reference.select`.
    """
    counts: Tensor = torch.ops.epi_ds.select_(bits, codes, before, threshold_code, first_entry)
    return counts


def _select(bits: Tensor, codes: Tensor, before: Tensor, threshold_code: int, first_entry: int) -> Tensor:
    counts: Tensor = implementation("select", codes).select_(
        bits, codes, before, threshold_code=threshold_code, first_entry=first_entry
    )
    return counts


_register(
    "select_(Tensor(a!) bits, Tensor codes, Tensor before, int threshold_code, int first_entry) -> Tensor",
    _select,
    lambda bits, codes, before, threshold_code, first_entry: codes.new_empty(2, dtype=torch.int64),
)


# --- hold, restore_, mask_, count_bits ---


def hold(values: Tensor, bits: Tensor, num_isolated: int) -> Tensor:
    """Return a copy of the isolated entries of ``values``, in order. See `epi_ds.kernels.reference.hold`."""
    held: Tensor = torch.ops.epi_ds.hold(values, bits, num_isolated)
    return held


_register(
    "hold(Tensor values, Tensor bits, int num_isolated) -> Tensor",
    lambda values, bits, num_isolated: implementation("hold", values).hold(values, bits, num_isolated),
    lambda values, bits, num_isolated: values.new_empty(num_isolated),
)


def restore_(values: Tensor, bits: Tensor, held: Tensor) -> None:
    """Write the entries that `hold` saved back into ``values``, in place. ``bits`` must be the same."""
    torch.ops.epi_ds.restore_(values, bits, held)


_register(
    "restore_(Tensor(a!) values, Tensor bits, Tensor held) -> ()",
    lambda values, bits, held: implementation("hold", values).restore_(values, bits, held),
)


def mask_(values: Tensor, bits: Tensor) -> None:
    """Set the isolated entries of ``values`` to zero, in place. See `epi_ds.kernels.reference.hold`."""
    torch.ops.epi_ds.mask_(values, bits)


_register(
    "mask_(Tensor(a!) values, Tensor bits) -> ()",
    lambda values, bits: implementation("hold", values).mask_(values, bits),
)


def count_bits(bits: Tensor) -> int:
    """Return how many bits are set. Synchronises with the device."""
    count: int = torch.ops.epi_ds.count_bits(bits)
    return count


_register(
    "count_bits(Tensor bits) -> SymInt",
    lambda bits: implementation("hold", bits).count_bits(bits),
    lambda bits: torch.library.get_ctx().new_dynamic_size(),
)


# --- pull_, pull_by_code_ ---


def pull_(
    target: Tensor, weights: Tensor, anchor: Tensor, factor: float | Tensor, *, source: Tensor | None = None
) -> None:
    """Add a multiple of what the weights have moved by to a tensor, which may be the weights themselves, in place.

    With ``source`` to that, and overwrite the target. See `epi_ds.kernels.reference.pull`.
    """
    factors = factor if isinstance(factor, Tensor) else None
    torch.ops.epi_ds.pull_(target, weights, anchor, factors, 0.0 if isinstance(factor, Tensor) else factor, source)


def _pull(
    target: Tensor,
    weights: Tensor,
    anchor: Tensor,
    factors: Tensor | None,
    factor: float,
    source: Tensor | None = None,
) -> None:
    implementation("pull", target).pull_(target, weights, anchor, factor if factors is None else factors, source=source)


_register(
    "pull_(Tensor(a!) target, Tensor weights, Tensor anchor, Tensor? factors, float factor, Tensor? source=None) -> ()",
    _pull,
)


def pull_by_code_(
    target: Tensor,
    weights: Tensor,
    anchor: Tensor,
    codes: Sequence[Tensor],
    factors: Tensor,
    *,
    source: Tensor | None = None,
) -> None:
    """Do as `pull_` does, with the factor of every entry's code, in place. See `epi_ds.kernels.reference.pull_by_code`.

    codes    stored 16-bit codes, each of all entries
    factors  [len(codes), 65536] fp32; the strongest of an entry counts
    """
    torch.ops.epi_ds.pull_by_code_(target, weights, anchor, codes, factors, source)


_register(
    "pull_by_code_(Tensor(a!) target, Tensor weights, Tensor anchor, Tensor[] codes, Tensor factors, "
    "Tensor? source=None) -> ()",
    lambda target, weights, anchor, codes, factors, source=None: implementation("pull_by_code", target).pull_by_code_(
        target, weights, anchor, codes, factors, source=source
    ),
)
