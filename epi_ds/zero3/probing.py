"""Gradients that are measured and dropped: windows that end without a step."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.utils import combine_grad_norm_groups, is_invalid_grad_norm

from epi_ds.zero3.mixin import IsolationMixin
from epi_ds.zero3.window import AccumulationWindow


def observe_window(zero3: Any, *, ema_decay: float) -> bool:
    """Let the gradients of the window that ends enter the importance without stepping, then drop them. Collective.

    zero3  the isolating ZeRO-3 optimizer, whose weights and states stay as they are

    Returns whether they were finite; if not, nothing was observed, and a dynamic loss scale is told of it.
    """
    context = zero3._epi_context
    context.window.close()
    context.backward_scale = float(zero3.loss_scale)
    zero3._pre_step()
    zero3._partition_all_parameters()
    # ZeRO-3's own norm: an isolated entry that is not finite counts too.
    finite = not is_invalid_grad_norm(combine_grad_norm_groups(super(IsolationMixin, zero3)._get_norm_groups()))
    if not finite:
        # As a skipped step does: otherwise every further probe would overflow at the same scale.
        zero3._update_scale(True)
    for sub_group_id in range(len(zero3.fp16_groups)):
        zero3._prepare_sub_group(sub_group_id, set())
        if finite:
            zero3._epi_observe(sub_group_id, ema_decay=ema_decay)
        _drop_gradient(zero3, sub_group_id)
    _forget_window(zero3)
    if finite:
        context.controller.count_observation(ema_decay)
    return finite


def drop_window(zero3: Any) -> None:
    """Drop the gradients of a window that will have no end, as if its backwards had not been. Collective."""
    zero3._epi_context.window.close()
    zero3._partition_all_parameters()
    for sub_group_id in range(len(zero3.fp16_groups)):
        zero3._prepare_sub_group(sub_group_id, set())
        _drop_gradient(zero3, sub_group_id)
    _forget_window(zero3)


def _forget_window(zero3: Any) -> None:
    # As before any backward: a parameter that the next window does not use must not step with a probe's gradient.
    zero3.grad_partitions_flat_buffer.zero_()
    zero3.zero_grad(set_to_none=True)
    zero3._epi_context.window = AccumulationWindow()
    zero3._post_step(set())


def _drop_gradient(zero3: Any, sub_group_id: int) -> None:
    """Release a sub-group that was prepared, without the gradient that it was prepared with."""
    gradient = zero3.fp32_partitioned_groups_flat[sub_group_id].grad
    # On NVMe a sub-group none of whose parameters was ever reduced has no gradient.
    if zero3.offload_optimizer and gradient is not None:
        gradient.zero_()
    if zero3._swappable_optimizer_subgroup(sub_group_id):
        # The zeros go to the disk, the state there is as it was.
        zero3._writeback_swap_state(sub_group_id, write_opt_state=False, write_gradients=True)
    else:
        zero3._release_sub_group(sub_group_id, set())
