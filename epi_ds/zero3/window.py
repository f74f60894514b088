"""Which parameters were reduced in the current accumulation window, and what of their buffers is not theirs.

[Note: stale gradients] ZeRO-3's accumulation buffer is overwritten by a parameter's first micro-batch of a window only
when that is the window's first micro-batch. So at the commit point

* a parameter that was not reduced in the window shows the gradient of the last window in which it was;
* a parameter first reduced in a *later* micro-batch shows the sum of that stale gradient and its new one.

The optimizer gets exactly what plain ZeRO-3 gives it. Importance must not: here it gets zero in the first case, and in
the second the sum of the new partitions, accumulated beside the buffer.

With offload there is a second buffer, the fp32 gradient that the optimizer reads: it is overwritten by what the last
micro-batch of a window reduces, and otherwise keeps the gradient of the last window in which that happened.

[Note: leftovers] Neither buffer is in a checkpoint, and those of a fresh engine are zero. So a resume is bit-exact only
where every window overwrites what an earlier one wrote. One that did not may be followed by another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from epi_ds.errors import UserError


class BufferRecord:
    """Which parameters a window did not overwrite in one buffer, by ZeRO-3's parameter id. See [Note: leftovers]."""

    def __init__(self) -> None:
        self.leftovers: set[int] = set()
        self._written: set[int] = set()
        self._overwritten: set[int] = set()

    def write(self, ds_id: int, *, overwrites: bool) -> None:
        """Note that a gradient was written to the buffer, or added to it."""
        self._written.add(ds_id)
        if overwrites:
            self._overwritten.add(ds_id)

    def discard(self) -> None:
        """Forget what the open window overwrote: the next one begins anew."""
        self._overwritten = set()

    def close(self) -> None:
        """End the window."""
        self.leftovers |= self._written - self._overwritten
        self._overwritten = set()


class AccumulationWindow:
    """Records the partitions that arrive between two optimizer steps. Begins with buffers of zeros."""

    def __init__(self) -> None:
        self._reduced: dict[int, Tensor | None] = {}
        self._closed: dict[int, Tensor | None] = {}
        self._sums = BufferRecord()
        self._copies = BufferRecord()

    def record(self, parameter: Any, partition: Tensor, *, buffer_is_stale: bool, is_copied_out: bool) -> None:
        """Note one reduced partition, by ZeRO-3's parameter id.

        buffer_is_stale  whether ZeRO-3 will add to the accumulation buffer instead of overwriting it
        is_copied_out    whether ZeRO-3 will copy the sum to the optimizer's own gradient, on the host
        """
        self._sums.write(parameter.ds_id, overwrites=not buffer_is_stale)
        if is_copied_out:
            self._copies.write(parameter.ds_id, overwrites=True)
        known = parameter.ds_id in self._reduced
        late = self._reduced.get(parameter.ds_id)
        if not known:
            self._reduced[parameter.ds_id] = partition.to(torch.float32, copy=True) if buffer_is_stale else None
        elif late is not None:
            late.add_(partition)

    @property
    def is_open(self) -> bool:
        """Whether gradients have arrived since the last step."""
        return bool(self._reduced)

    def check_closed(self, what: str, *, because: str, remedy: str) -> None:
        """Raise UserError where gradients have arrived since the last step.

        what     is not to be done with them
        because  of what would become of them, as it follows "the accumulation window is open, and"
        remedy   ends before "after engine.step() at an accumulation boundary"
        """
        if self.is_open:
            raise UserError(
                f"{what}: the accumulation window is open, and {because}; {remedy} after engine.step() at an "
                "accumulation boundary"
            )

    def discard(self) -> None:
        """Forget the open window: its gradients were thrown away."""
        self._reduced = {}
        self._sums.discard()
        self._copies.discard()

    def close(self) -> None:
        """End the window; what it recorded stays readable until `forget`."""
        self._closed, self._reduced = self._reduced, {}
        self._sums.close()
        self._copies.close()

    def forget(self) -> None:
        """Free what the closed window recorded: its step is over."""
        self._closed = {}

    def was_reduced(self, parameter: Any) -> bool:
        """Whether the parameter was reduced in the closed window."""
        return parameter.ds_id in self._closed

    def own_gradient(self, parameter: Any) -> Tensor | None:
        """Return the parameter's own gradient partition where the buffer holds more than that. fp32, loss-scaled."""
        return self._closed.get(parameter.ds_id)

    def has_leftover(self, parameter: Any) -> bool:
        """Whether a later step may apply a gradient that a resumed engine will not have. See [Note: leftovers]."""
        return parameter.ds_id in self._sums.leftovers or parameter.ds_id in self._copies.leftovers
