"""The third step of a refresh: how much may be isolated, and whether the mask in force may stay."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from epi_ds.config import EPIConfig
from epi_ds.isolation.schedule import ratio_at
from epi_ds.isolation.search.adaptive import Drift, covering_budgets, drift_of
from epi_ds.isolation.search.threshold import Preview, ThresholdSearch


class Budget(NamedTuple):
    """How much a new mask may isolate. The same on every rank."""

    ratio: float
    """The one that is, or would be, requested."""
    entries: Tensor
    """[rows] int64: most entries by row of the search, see `ThresholdSearch.budgets`."""
    drift: Drift | None
    """How far a mask that may stay has drifted; None where it may not stay."""
    mask_stays: bool
    """Whether it has drifted so little that no new one is selected."""


def find_budget(
    search: ThresholdSearch,
    preview: Preview | None,
    *,
    config: EPIConfig,
    step: int,
    staying: int,
    asked: int | None = None,
) -> Budget:
    """Return the budget after ``step`` applied steps; ``staying`` is that of `take_preview`.

    asked  entries to isolate, where ``ratio`` does not say how many; with ``ratio: 0`` none are all the same

    Raises RuntimeError for ``ratio: adaptive`` without a preview.
    """
    ratio, entries = _requested(search, preview, config=config, step=step)
    if asked is not None and ratio > 0:
        entries = torch.tensor([asked], dtype=torch.int64)
    if preview is None or not staying:
        return Budget(ratio, entries, None, mask_stays=False)
    drift = drift_of(preview, budgets=entries, isolated=staying)
    return Budget(ratio, entries, drift, mask_stays=max(drift.at_most, drift.growth) <= config.max_drift)


def _requested(
    search: ThresholdSearch, preview: Preview | None, *, config: EPIConfig, step: int
) -> tuple[float, Tensor]:
    """Return the ratio, and what it allows by row of the search."""
    if not isinstance(config.ratio, str):
        ratio = ratio_at(config.ratio, step, warmup_steps=config.warmup_steps)
        return ratio, search.budgets(ratio)
    if preview is None:
        raise RuntimeError("ratio: adaptive without a preview")
    covering = covering_budgets(preview, coverage=config.coverage)
    entries = torch.minimum(search.budgets(config.max_ratio), covering)
    return int(entries.sum()) / search.numel, entries
