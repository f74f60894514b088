"""A world of one: a search without anyone to exchange with."""

from __future__ import annotations

from torch import Tensor

from epi_ds.isolation.search.bracket import Answers, choose


class OneRank:
    """The exchange of a world of one; counts the exchanges."""

    def __init__(self) -> None:
        self.passes = 0
        """Exchanges, each of which asks about all entries."""

    def maximum(self, values: Tensor) -> Tensor:
        """See `Exchange.maximum`."""
        self.passes += 1
        return values

    def total(self, values: Tensor) -> Tensor:
        """See `Exchange.total`."""
        self.passes += 1
        return values

    def answers(self, counts: Tensor, budgets: Tensor) -> Answers:
        """See `Exchange.answers`."""
        self.passes += 1
        return choose(counts, budgets)
