"""Which parameters were reduced in the current accumulation window, and what of their buffers is not theirs.

[Note: stale gradients] ZeRO-3's accumulation buffer is overwritten by a parameter's first micro-batch of a window only
when that is the window's first micro-batch. So at the commit point

* a parameter that was not reduced in the window shows the gradient of the last window in which it was;
* a parameter first reduced in a *later* micro-batch shows the sum of that stale gradient and its new one.

The optimizer gets exactly what plain ZeRO-3 gives it. Importance must not: here it gets zero in the first case, and in
the second the sum of the new partitions, accumulated beside the buffer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class AccumulationWindow:
    """Records the partitions that arrive between two optimizer steps."""

    def __init__(self) -> None:
        self._reduced: dict[int, Tensor | None] = {}
        self._closed: dict[int, Tensor | None] = {}

    def record(self, parameter: Any, partition: Tensor, *, buffer_is_stale: bool) -> None:
        """Note one reduced partition, by ZeRO-3's parameter id.

        buffer_is_stale  whether ZeRO-3 will add to the accumulation buffer instead of overwriting it
        """
        known = parameter.ds_id in self._reduced
        late = self._reduced.get(parameter.ds_id)
        if not known:
            self._reduced[parameter.ds_id] = partition.to(torch.float32, copy=True) if buffer_is_stale else None
        elif late is not None:
            late.add_(partition)

    def discard(self) -> None:
        """Forget the open window: its gradients were thrown away."""
        self._reduced = {}

    def close(self) -> None:
        """End the window; what it recorded stays readable until the next one is closed."""
        self._closed, self._reduced = self._reduced, {}

    def was_reduced(self, parameter: Any) -> bool:
        """Whether the parameter was reduced in the closed window."""
        return parameter.ds_id in self._closed

    def own_gradient(self, parameter: Any) -> Tensor | None:
        """Return the parameter's own gradient partition where the buffer holds more than that. fp32, loss-scaled."""
        return self._closed.get(parameter.ds_id)
