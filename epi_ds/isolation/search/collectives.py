"""Merging integers over the ranks. The only place below the DeepSpeed floor that imports torch.distributed."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from epi_ds.choices import Transport
from epi_ds.isolation.search.bracket import Answers, choose
from epi_ds.isolation.search.exchange import Traffic
from epi_ds.isolation.search.traffic import ANSWER_INTEGERS, Collective, owned_rows, rows_per_rank


class GroupExchange:
    """Merges integer tensors over a process group. All transports give the same bits: integers do not round.

    Tensors travel in their own dtype, which must hold the sums. They go in and come out on the CPU.
    """

    def __init__(self, group: dist.ProcessGroup | None, *, device: torch.device, transport: Transport) -> None:
        """``group`` None is the default group; ``device`` is where the group's backend communicates.

        Raises ValueError for ``Transport.AUTO``, which `pick` resolves.
        """
        if transport is Transport.AUTO:
            raise ValueError(
                "an exchange needs a transport, got auto; choose one by epi_ds.isolation.search.traffic.pick"
            )
        self._group = group
        self._device = device
        self.world_size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.transport = transport
        self.traffic = Traffic(0, 0)
        """Since the exchange was made."""

    def maximum(self, values: Tensor) -> Tensor:
        """Element-wise maximum over the ranks, of the values' dtype."""
        if self.transport is Transport.ALL_GATHER:
            return self._gather(values).amax(dim=0)
        return self._reduce(values.clone(), dist.ReduceOp.MAX)

    def total(self, values: Tensor) -> Tensor:
        """Element-wise sum over the ranks."""
        return self._total(values.clone())

    def answers(self, counts: Tensor, budgets: Tensor) -> Answers:
        """Return `choose` of the sum of ``counts`` over the ranks, for all rows. See `Exchange.answers`."""
        if self.transport is not Transport.REDUCE_SCATTER:
            return choose(self._total(counts), budgets)
        own = owned_rows(len(counts), rank=self.rank, world_size=self.world_size)
        sums = self._reduce_scatter(counts)[: own.stop - own.start]
        padded = counts.new_zeros(rows_per_rank(len(counts), self.world_size), ANSWER_INTEGERS)
        padded[: len(sums)] = torch.stack(choose(sums, budgets[own]), dim=1)
        # Padding lies behind the last row only: every rank before it owns a full share.
        return Answers(*self._gather(padded).flatten(0, 1)[: len(counts)].unbind(dim=1))

    def concatenate(self, partition: Tensor) -> Tensor:
        """Return the partitions of all ranks, in rank order, on this rank's device. Equal lengths."""
        return self._gather(partition).view(-1)

    def _total(self, values: Tensor) -> Tensor:
        """Return the sum over the ranks; ``values`` may be overwritten."""
        if self.transport is Transport.ALL_GATHER:
            return self._gather(values).sum(dim=0, dtype=values.dtype)
        return self._reduce(values, dist.ReduceOp.SUM)

    def _gather(self, values: Tensor) -> Tensor:
        """Return ``[world_size, *values.shape]``."""
        sent = values.to(self._device).contiguous()
        gathered = sent.new_empty(self.world_size * sent.numel())
        dist.all_gather_into_tensor(gathered, sent.view(-1), group=self._group)
        self._record(Collective.ALL_GATHER, sent)
        return gathered.view(self.world_size, *values.shape).to(values.device)

    def _reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        """Return the reduction over the ranks; ``values`` may be overwritten."""
        sent = values.to(self._device)
        dist.all_reduce(sent, op=operation, group=self._group)
        self._record(Collective.ALL_REDUCE, sent)
        return sent.to(values.device)

    def _reduce_scatter(self, rows: Tensor) -> Tensor:
        """Return this rank's share of the rows, summed over the ranks; padding included."""
        share = rows_per_rank(len(rows), self.world_size)
        sent = rows.to(self._device)
        if share * self.world_size > len(rows):
            sent = torch.cat([sent, sent.new_zeros(share * self.world_size - len(rows), rows.shape[1])])
        summed = sent.new_empty(share, rows.shape[1])
        # NCCL and gloo both have it for int32 and int64; gloo sends whole vectors inside it.
        dist.reduce_scatter_tensor(summed, sent, group=self._group)
        self._record(Collective.REDUCE_SCATTER, sent)
        return summed.to(rows.device)

    def _record(self, collective: Collective, sent: Tensor) -> None:
        sent_bytes = collective.sent_bytes(sent.numel() * sent.element_size(), self.world_size)
        self.traffic = Traffic(self.traffic.collectives + 1, self.traffic.sent_bytes + sent_bytes)
