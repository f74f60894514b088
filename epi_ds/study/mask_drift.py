"""How far the mask of a run wandered, from what its refreshes wrote: the paper's tables 11 and 12 in a few numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from epi_ds.study.measures import MaskDrift


def mask_drift_of(metrics: Iterable[Mapping[str, Any]]) -> MaskDrift | None:
    """Return how the masks of a run changed; None where nothing was ever isolated.

    metrics  its lines
    """
    found = [line for line in metrics if line["event"] == "refresh" and line["isolated"]]
    if not found:
        return None
    # A refresh after a mask was loaded, or after one that isolated nothing, has no overlap with the one before.
    overlaps = [line["jaccard"] for line in found if line["jaccard"] is not None]
    rates: dict[str, list[float]] = {}
    for line in found:
        for layer, rate in line["layer_flip_rate"].items():
            if rate is not None:
                rates.setdefault(layer, []).append(rate)
    return MaskDrift(
        refreshes=len(found),
        isolated_share=found[-1]["achieved_ratio"],
        first_last=found[-1]["jaccard_first"] if len(found) > 1 else None,
        between_refreshes=fmean(overlaps) if overlaps else None,
        layer_flip_rate={layer: fmean(values) for layer, values in rates.items()},
    )
