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
    """Share of the isolated entries that a mask selected now would release, between two bounds."""

    at_least: float
    at_most: float


def drift_of(preview: Preview, *, budget: int, isolated: int) -> Drift:
    """Return the share of isolated entries below the would-be threshold, which lies between two edges of the preview.

    isolated  entries isolated now, over all ranks; not 0
    """
    answers = choose(preview.entries.unsqueeze(0), torch.tensor([budget]))
    first = min(int(answers.first), len(preview.edges) - 1)
    kept_at_least = int(preview.isolated[first])
    kept_at_most = int(preview.isolated[first - 1]) if first else isolated
    return Drift(1.0 - kept_at_most / isolated, 1.0 - kept_at_least / isolated)


def covering_ratio(preview: Preview, *, coverage: float, numel: int, largest: float) -> float:
    """Return the share of entries that hold ``coverage`` of the importance, at most ``largest``.

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
    # Decimal, as a ratio that a user wrote.
    return min(largest, round(entries / numel, 9))
