"""How a search merges integers over the ranks, whoever carries them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from epi_ds.isolation.search.bracket import Answers


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
