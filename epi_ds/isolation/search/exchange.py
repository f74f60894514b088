"""How a search merges integers over the ranks, whoever carries them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from epi_ds.isolation.search.bracket import Answers


class Traffic(NamedTuple):
    """What a rank has sent."""

    collectives: int
    sent_bytes: int
    """Bytes that the rank sent, by the cost model of traffic.py."""

    def since(self, before: Traffic) -> Traffic:
        """Return what was sent after it was ``before``."""
        return Traffic(self.collectives - before.collectives, self.sent_bytes - before.sent_bytes)


class Exchange(Protocol):
    """Merges integer tensors over all ranks. Every rank gets the same bits."""

    def maximum(self, values: Tensor) -> Tensor:
        """Element-wise maximum over the ranks."""

    def total(self, values: Tensor) -> Tensor:
        """Element-wise sum over the ranks, of the values' dtype, which must hold it."""

    def answers(self, counts: Tensor, budgets: Tensor) -> Answers:
        """Return `choose` of the element-wise sum over the ranks of ``counts``, for all rows, to every rank.

        counts   [rows, edges] of a dtype that holds the sums; may be overwritten
        budgets  [rows] int64, the same on all ranks
        """
