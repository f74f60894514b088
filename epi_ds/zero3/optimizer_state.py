"""Where ZeRO-3 keeps the state of a sub-group's optimizer: which optimizer steps it, in memory or on a disk."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any


def stepping_optimizer(zero3: Any, sub_group: int) -> Any:
    """Return the optimizer that steps a sub-group.

    With partial offload (``offload_optimizer.ratio`` < 1) the first sub-groups live on the accelerator, and an
    optimizer of their own steps them there. The same choice as in ZeRO-3's ``_optimizer_step``.
    """
    if zero3.offload_optimizer and zero3.subgroup_to_device[sub_group] != "cpu":
        return zero3.backup_optimizer
    return zero3.optimizer


@contextmanager
def optimizer_state(zero3: Any, sub_group: int) -> Iterator[MutableMapping[str, Any]]:
    """Yield the state of a sub-group's flat partition, to be edited in place between two steps; empty before the first.

    State that lies on a disk is read for the time of the block and written back after it.
    """
    partition = zero3.fp32_partitioned_groups_flat[sub_group]
    state = stepping_optimizer(zero3, sub_group).state.get(partition, {})
    # Not by its size: without a write-back of its own, a swapped tensor may go on showing a buffer that others use.
    if not state or not zero3._swappable_optimizer_subgroup(sub_group):
        yield state
        return
    zero3._optimizer_states_and_gradient_swap_in(sub_group)
    yield state
    # Waits for the disk, which a swap-out of pipelined writes leaves to the next one: a save may come before that.
    zero3._writeback_swap_state(sub_group, write_opt_state=True, write_gradients=False)
