"""Narrowing a bracket of codes around a threshold by counts at its edges. What a search and a sketch have in common.

[Note: brackets] A threshold is the smallest code with at most `budget` entries at or above it. Counts never rise with
the code, so true counts at the edges of a grid say between which two neighbouring edges the threshold lies, and the
next grid covers only the codes between them. A few rounds, of `round_widths` edges each, leave neighbours: the upper
one is the threshold, exactly. A row is one such search; all rows are narrowed together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def round_widths(code_bits: int, *, most_bits: int) -> tuple[int, ...]:
    """Return the edges of every round that together resolve ``code_bits`` bits, at most 2^``most_bits`` a round.

    The bits are dealt evenly, the larger rounds first: 31 bits at 11 a round are 2048, 1024 and 1024 edges.
    """
    rounds = -(-code_bits // most_bits)
    return tuple(1 << ((code_bits + rounds - 1 - index) // rounds) for index in range(rounds))


def count_dtype(largest: int) -> torch.dtype:
    """Return the narrowest dtype for counts whose sums over the ranks do not exceed ``largest``: half the wire."""
    return torch.int32 if largest < 1 << 31 else torch.int64


class Answers(NamedTuple):
    """Where the thresholds of some rows lie among the edges of one round. All ``[rows]``, of the counts' dtype."""

    first: Tensor
    """Index of the first edge within budget; the number of edges where there is none."""
    at_or_above: Tensor
    """Entries at or above that edge."""
    at_or_above_previous: Tensor
    """Entries at or above the edge before it; meaningless where the first edge is within budget."""


def choose(counts: Tensor, budgets: Tensor) -> Answers:
    """Return the first edge of every row whose count is within the row's budget.

    counts   [rows, edges] integer, never rising along a row
    budgets  [rows] int64
    """
    first = (counts > budgets.unsqueeze(1)).sum(dim=1)
    # A row without an edge within budget is refused by `Brackets.narrow`, on every rank alike; here it must not fault.
    index = first.clamp(max=counts.shape[1] - 1).unsqueeze(1)
    previous = (first - 1).clamp(min=0).unsqueeze(1)
    return Answers(first.to(counts.dtype), counts.gather(1, index).squeeze(1), counts.gather(1, previous).squeeze(1))


class Brackets(NamedTuple):
    """One bracket of codes per row: ``below`` < threshold <= ``above``. All ``[rows]`` int64 on the CPU."""

    below: Tensor
    above: Tensor
    count_below: Tensor
    """Entries at or above ``below``: more than the row's budget."""
    count_above: Tensor
    """Entries at or above ``above``: at most the row's budget."""

    @classmethod
    def whole(cls, totals: Tensor, *, top: int) -> Brackets:
        """Return the brackets ``(0, top]`` of rows that hold ``totals`` entries ([rows] int64), all below ``top``.

        Code 0 is below every threshold: zeros are never isolated.
        """
        zeros = torch.zeros_like(totals)
        return cls(zeros, torch.full_like(totals, top), totals.clone(), zeros.clone())

    def edges(self, width: int, *, unit: int = 1) -> Tensor:
        """Return ``width`` edges per row: ``[rows, width]`` int32, never falling, the last one ``above``.

        Edges are ``unit`` apart or a multiple of it, as near to equally far as that allows; ``below`` and ``above``
        must be multiples of it.
        """
        units = (self.above - self.below) // unit
        step = -(-units // width)
        # Counted down from `above`, in units and in place: no product leaves 32 bits, and with a thousand rows a
        # temporary of 64 would be 16 MB.
        edges = step.int().unsqueeze(1) * torch.arange(-1, -width - 1, -1, dtype=torch.int32)
        edges += units.int().unsqueeze(1)
        edges.clamp_(min=0).mul_(-unit)
        edges += self.above.int().unsqueeze(1)
        return edges

    def narrow(self, edges: Tensor, answers: Answers) -> Brackets:
        """Return the brackets between the edges that ``answers`` names.

        Raises RuntimeError for a row without an edge within budget: an entry at or above ``above``.
        """
        first = answers.first.long().unsqueeze(1)
        beyond = torch.nonzero(first[:, 0] >= edges.shape[1])
        if len(beyond):
            row = int(beyond[0])
            raise RuntimeError(
                f"more entries than the budget lie at or above code {int(self.above[row]):#x} (row {row} of "
                f"{len(first)}), but no finite importance does; the importance holds inf or nan"
            )
        moved = first[:, 0] > 0
        previous = edges.gather(1, (first - 1).clamp(min=0)).squeeze(1).long()
        return Brackets(
            below=torch.where(moved, previous, self.below),
            above=edges.gather(1, first).squeeze(1).long(),
            count_below=torch.where(moved, answers.at_or_above_previous.long(), self.count_below),
            count_above=answers.at_or_above.long(),
        )
