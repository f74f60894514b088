"""The obviously right, slow truth about a selection: whole tensors, native floats, one process."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from epi_ds.config import Normalizer, Selection


def _normalized(values: np.ndarray, tau: float, normalizer: Normalizer | None) -> np.ndarray:
    """Whether each entry of one layer is isolated at ``tau``, straight from the definition."""
    wide = values.astype(np.float64)
    if normalizer is None:
        return wide >= tau
    low, high = wide.min(), wide.max()
    if low == high:
        return np.zeros(values.shape, dtype=bool)
    if normalizer is Normalizer.MINMAX:
        return (wide >= low + tau * (high - low)) & (wide > low)
    return (wide >= tau * _mean(wide)) & (wide > 0)


def _mean(wide: np.ndarray) -> float:
    total = sum((Fraction(float(v)) for v in wide), start=Fraction(0))
    return float(total / len(wide))


def _smallest_tau(isolates, budget: int) -> float:
    """Bisect the bit patterns of the positive fp32 numbers; ``isolates(tau)`` counts entries."""
    below, above = 0, 0x7F800000
    while above - below > 1:
        middle = (below + above) // 2
        tau = float(np.array(middle, dtype=np.int32).view(np.float32).astype(np.float64))
        if isolates(tau) <= budget:
            above = middle
        else:
            below = middle
    return float(np.array(above, dtype=np.int32).view(np.float32).astype(np.float64))


def oracle_masks(
    layers: Sequence[np.ndarray], *, ratio: str, selection: Selection, normalizer: Normalizer
) -> list[np.ndarray]:
    """Return the mask of every layer. ``layers`` are flat fp32 arrays, ``ratio`` a decimal string."""
    if selection is Selection.PER_LAYER:
        masks = []
        for values in layers:
            budget = int(Fraction(ratio) * len(values))
            # The smallest t > 0 with at most `budget` entries at or above it isolates whole ties or none of them.
            candidates, counts = np.unique(values, return_counts=True)
            isolated = np.zeros(values.shape, dtype=bool)
            room = budget
            for value, count in zip(candidates[::-1], counts[::-1], strict=True):
                if value <= 0 or count > room:
                    break
                room -= count
                isolated |= values == value
            masks.append(isolated)
        return masks
    used = None if selection is Selection.RAW_GLOBAL else normalizer
    means = {}
    if used is Normalizer.MEAN:
        means = {i: _mean(v.astype(np.float64)) for i, v in enumerate(layers)}

    def masks_at(tau: float) -> list[np.ndarray]:
        if used is Normalizer.MEAN:
            return [
                (v.astype(np.float64) >= tau * means[i]) & (v > 0) & (v.min() != v.max()) for i, v in enumerate(layers)
            ]
        return [_normalized(v, tau, used) for v in layers]

    budget = int(Fraction(ratio) * sum(len(v) for v in layers))
    tau = _smallest_tau(lambda t: sum(int(m.sum()) for m in masks_at(t)), budget)
    return masks_at(tau)
