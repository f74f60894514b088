"""The obviously right, slow truth about a selection: whole tensors, native floats, one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from epi_ds.choices import Normalizer, Selection

_LARGEST = float(np.finfo(np.float32).max)


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
    """The mean as it is defined: of whole multiples of 2^-52 of the largest entry's binade, rounded down to them."""
    unit = Fraction(2) ** (max(math.frexp(float(wide.max()))[1] - 1, -126) - 52)
    total = sum(Fraction(float(v)) // unit for v in wide) * unit
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


def _masks_at(
    layers: Sequence[np.ndarray], selection: Selection, normalizer: Normalizer
) -> Callable[[float], list[np.ndarray]]:
    """Return the masks of a global selection as a function of tau."""
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

    return masks_at


def _mask_of_one(values: np.ndarray, budget: int) -> np.ndarray:
    """Isolate whole ties, the greatest first, as long as they fit."""
    candidates, counts = np.unique(values, return_counts=True)
    isolated = np.zeros(values.shape, dtype=bool)
    room = budget
    for value, count in zip(candidates[::-1], counts[::-1], strict=True):
        if value <= 0 or count > room:
            break
        room -= count
        isolated |= values == value
    return isolated


def _tied_mass_of_one(values: np.ndarray, mask: np.ndarray) -> int:
    """Entries of the greatest value outside the mask; where only zeros are outside, all of them."""
    outside = values[~mask]
    return int(np.count_nonzero(outside == outside.max())) if len(outside) else 0


class OracleMasks(NamedTuple):
    """What a selection should find."""

    masks: list[np.ndarray]
    budget: int
    tied_mass: int
    """How many more entries the next smaller threshold isolates; all others where there is none."""


def oracle(layers: Sequence[np.ndarray], *, ratio: str, selection: Selection, normalizer: Normalizer) -> OracleMasks:
    """Return the mask of every layer. ``layers`` are flat fp32 arrays, ``ratio`` a decimal string."""
    if selection is Selection.PER_LAYER:
        budgets = [int(Fraction(ratio) * len(values)) for values in layers]
        masks = [_mask_of_one(values, budget) for values, budget in zip(layers, budgets, strict=True)]
        tied = sum(_tied_mass_of_one(values, mask) for values, mask in zip(layers, masks, strict=True))
        return OracleMasks(masks, sum(budgets), tied)
    masks_at = _masks_at(layers, selection, normalizer)
    total = sum(len(v) for v in layers)
    budget = int(Fraction(ratio) * total)
    tau = _smallest_tau(lambda t: sum(int(m.sum()) for m in masks_at(t)), budget)
    masks = masks_at(tau)
    if selection is Selection.RAW_GLOBAL:
        return OracleMasks(masks, budget, _tied_mass_of_one(np.concatenate(layers), np.concatenate(masks)))
    previous = np.nextafter(np.float32(tau), np.float32(0)).astype(np.float64) if tau < 2.0**128 else _LARGEST
    more = total if previous == 0 else sum(int(m.sum()) for m in masks_at(float(previous)))
    return OracleMasks(masks, budget, more - sum(int(m.sum()) for m in masks))


def oracle_masks(
    layers: Sequence[np.ndarray], *, ratio: str, selection: Selection, normalizer: Normalizer
) -> list[np.ndarray]:
    """Return the masks of `oracle`."""
    return oracle(layers, ratio=ratio, selection=selection, normalizer=normalizer).masks
