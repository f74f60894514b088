"""Merging integers over the ranks. The only place below the DeepSpeed floor that imports torch.distributed."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from epi_ds.config import Transport

# Gathering sends (W - 1) times the vector, reducing at most twice; up to here both are small, and a trace that shows
# every rank's sketch is easier to read.
_LARGEST_GATHERED_WORLD = 8


class Traffic(NamedTuple):
    """What an exchange has sent since it was made."""

    collectives: int
    sent_bytes: int
    """Bytes this rank sent, by the ring cost model of its transport."""


class GroupExchange:
    """Merges integer tensors over a process group. All transports give the same bits: integers do not round."""

    def __init__(
        self, group: dist.ProcessGroup | None, *, device: torch.device, transport: Transport = Transport.AUTO
    ) -> None:
        """``group`` None is the default group; ``device`` is where the group's backend communicates."""
        self._group = group
        self._device = device
        self.world_size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        if transport is Transport.AUTO:
            small = self.world_size <= _LARGEST_GATHERED_WORLD
            transport = Transport.ALL_GATHER if small else Transport.ALL_REDUCE
        self.transport = transport
        self.traffic = Traffic(0, 0)

    def maximum(self, values: Tensor) -> Tensor:
        """Element-wise maximum over the ranks. CPU tensors in, CPU tensors out."""
        if self.transport is Transport.ALL_GATHER:
            return self._gather(values).amax(dim=0)
        return self._reduce(values, dist.ReduceOp.MAX)

    def total(self, values: Tensor) -> Tensor:
        """Element-wise sum over the ranks. CPU tensors in, CPU tensors out."""
        if self.transport is Transport.ALL_GATHER:
            return self._gather(values).sum(dim=0)
        return self._reduce(values, dist.ReduceOp.SUM)

    def concatenate(self, partition: Tensor) -> Tensor:
        """Return the partitions of all ranks, in rank order, on this rank's device. Equal lengths."""
        return self._gather(partition).view(-1)

    def _gather(self, values: Tensor) -> Tensor:
        sent = values.to(self._device).contiguous()
        gathered = [torch.empty_like(sent) for _ in range(self.world_size)]
        dist.all_gather(gathered, sent, group=self._group)
        self._record((self.world_size - 1) * sent.numel() * sent.element_size())
        return torch.stack(gathered).to(values.device)

    def _reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        sent = values.to(self._device, copy=True)
        dist.all_reduce(sent, op=operation, group=self._group)
        self._record(2 * (self.world_size - 1) * sent.numel() * sent.element_size() // self.world_size)
        return sent.to(values.device)

    def _record(self, sent_bytes: int) -> None:
        self.traffic = Traffic(self.traffic.collectives + 1, self.traffic.sent_bytes + sent_bytes)
