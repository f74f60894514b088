"""What the preview of a search decides: whether masks have drifted, and how much to isolate.

Both read counts that are the same integers on all ranks, and compute from them in ways that round alike everywhere.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from epi_ds.isolation.bracket import choose
from epi_ds.isolation.importance import decode
from epi_ds.isolation.threshold import Preview


class Drift(NamedTuple):
    """How a mask selected now would differ from the one in force."""

    at_least: float
    """Share of the isolated entries that it would release: at least this,"""
    at_most: float
    """and at most this."""
    growth: float
    """Share of the entries of the new mask, at least, that are more than there are now; 0 where it has no more. A mask
    whose budget grows releases nothing, and yet is no longer the one asked for."""


def drift_of(preview: Preview, *, budget: int, isolated: int) -> Drift:
    """Compare the mask in force with the would-be threshold, which lies between two edges of the preview.

    isolated  entries isolated now, over all ranks; not 0
    """
    answers = choose(preview.entries.unsqueeze(0), torch.tensor([budget]))
    first = min(int(answers.first), len(preview.edges) - 1)
    kept_at_least = int(preview.isolated[first])
    kept_at_most = int(preview.isolated[first - 1]) if first else isolated
    entries = int(preview.entries[first])
    growth = max(0.0, 1.0 - isolated / entries) if entries else 0.0
    return Drift(1.0 - kept_at_most / isolated, 1.0 - kept_at_least / isolated, growth)


def covering_budget(preview: Preview, *, coverage: float, numel: int) -> int:
    """Return how many entries hold ``coverage`` of the importance.

    Importance is the normalised one that selection compares. Entries between two edges count as their mean; within the
    bin where the share is reached, as many as are needed.

    numel  covered entries over all ranks
    """
    values = decode(preview.edges).tolist()
    bounds = list(zip([0.0, *values[:-1]], values, strict=True))
    above = preview.entries.tolist()
    # Entries in each bin [lower edge, upper edge), from the smallest: the last edge is beyond every entry.
    counts = [before - now for before, now in zip([numel, *above[:-1]], above, strict=True)]
    # The first bin is zeros, and what is smaller than all normal numbers: it holds nothing.
    means = [
        0.0,
        *((low + high) / 2 if count else 0.0 for (low, high), count in zip(bounds[1:], counts[1:], strict=True)),
    ]
    # fsum rounds once, so that all machines agree.
    needed = coverage * math.fsum(count * mean for count, mean in zip(counts, means, strict=True))
    taken, entries = 0.0, 0
    for count, mean in zip(reversed(counts), reversed(means), strict=True):
        if taken + count * mean >= needed:
            entries += math.ceil((needed - taken) / mean) if mean else 0
            break
        taken, entries = taken + count * mean, entries + count
    return entries
