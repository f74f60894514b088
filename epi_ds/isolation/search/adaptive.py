"""What the preview of a search decides: whether masks have drifted, and how much to isolate.

Both read counts that are the same integers on all ranks, and compute from them in ways that round alike everywhere.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from epi_ds.isolation.importance.codes import decode
from epi_ds.isolation.search.bracket import choose
from epi_ds.isolation.search.threshold import Preview


class Drift(NamedTuple):
    """How a mask selected now would differ from the one in force."""

    at_least: float
    """Share of the isolated entries that it would release: at least this,"""
    at_most: float
    """and at most this."""
    growth: float
    """Share of the entries of the new mask, at least, that are more than there are now; 0 where it has no more. A mask
    whose budget grows releases nothing, and yet is no longer the one asked for."""


def drift_of(preview: Preview, *, budgets: Tensor, isolated: int) -> Drift:
    """Compare the mask in force with the would-be thresholds, each of which lies between two edges of the preview.

    budgets   [rows] int64
    isolated  entries isolated now, over all ranks; not 0
    """
    rows = torch.arange(len(budgets))
    first = choose(preview.entries, budgets).first.clamp(max=preview.edges.shape[1] - 1)
    # The first edge is the smallest positive code, and zeros are never kept.
    kept = preview.isolated[rows, (first - 1).clamp(min=0)], preview.isolated[rows, first]
    kept_at_most, kept_at_least = (int(counts.sum()) for counts in kept)
    entries = int(preview.entries[rows, first].sum())
    growth = max(0.0, 1.0 - isolated / entries) if entries else 0.0
    return Drift(1.0 - kept_at_most / isolated, 1.0 - kept_at_least / isolated, growth)


def covering_budgets(preview: Preview, *, coverage: float) -> Tensor:
    """Return how many entries of each row hold ``coverage`` of its importance. [rows] int64.

    Importance is the one that selection compares, so normalised where that is. Entries between two edges count as their
    mean; within the bin where the share is reached, as many as are needed.
    """
    rows = zip(decode(preview.edges).tolist(), preview.entries.tolist(), strict=True)
    return torch.tensor([_covering_budget(edges, above, coverage=coverage) for edges, above in rows], dtype=torch.int64)


def _covering_budget(edges: list[float], above: list[int], *, coverage: float) -> int:
    """Return the budget of one row, of which ``above`` entries lie at or above the values ``edges``."""
    # By bins [lower edge, upper edge), from the smallest. Below the first are zeros, above the last is nothing.
    counts = [more - fewer for more, fewer in pairwise(above)]
    means = [(low + high) / 2 if count else 0.0 for (low, high), count in zip(pairwise(edges), counts, strict=True)]
    # fsum rounds once, so that all machines agree.
    needed = coverage * math.fsum(count * mean for count, mean in zip(counts, means, strict=True))
    taken, entries = 0.0, 0
    for count, mean in zip(reversed(counts), reversed(means), strict=True):
        if taken + count * mean >= needed:
            return entries + (math.ceil((needed - taken) / mean) if mean else 0)
        taken, entries = taken + count * mean, entries + count
    return entries
