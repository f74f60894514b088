"""Simulated ranks in one process: up to a thousand of them, cut at random, merged in any order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from epi_ds.isolation.importance.codes import codes_of
from epi_ds.isolation.search.bracket import Answers, choose
from epi_ds.isolation.search.sketch import PartitionSketch, SegmentCodes
from epi_ds.isolation.search.traffic import owned_rows


class World:
    """The sketches of many ranks, answering as their merge, so that the exchange may be the identity.

    ``tree`` merges random pairs until one is left; otherwise the ranks merge one after another.
    """

    def __init__(self, parts: Sequence[PartitionSketch], *, tree: np.random.Generator | None = None) -> None:
        self.parts = parts
        self.num_layers = parts[0].num_layers
        self.tree = tree

    def extremes(self) -> Tensor:
        return self._merge([part.extremes() for part in self.parts], torch.maximum)

    def fixed_point_sums(self, max_codes: Tensor) -> Tensor:
        return self._merge([part.fixed_point_sums(max_codes) for part in self.parts], torch.add)

    def counts(self, edges: Tensor, *, dtype: torch.dtype = torch.int64) -> Tensor:
        return self._merge([part.counts(edges, dtype=dtype) for part in self.parts], torch.add)

    def _merge(self, pending: list[Tensor], merge: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        while len(pending) > 1:
            one, other = (0, 1) if self.tree is None else self.tree.choice(len(pending), 2, replace=False)
            merged = merge(pending[one], pending[other])
            for index in sorted((one, other), reverse=True):
                del pending[index]
            pending.insert(0, merged)
        return pending[0]


class CountingExchange:
    """What remains to be exchanged of a `World`: nothing. Notes the length of every exchange."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def maximum(self, values: Tensor) -> Tensor:
        self.lengths.append(values.numel())
        return values

    def total(self, values: Tensor) -> Tensor:
        self.lengths.append(values.numel())
        return values

    def answers(self, counts: Tensor, budgets: Tensor) -> Answers:
        self.lengths.append(counts.numel())
        return choose(counts, budgets)


class ScatteringExchange(CountingExchange):
    """Every one of ``world_size`` owners sees and answers for its own layers only."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.world_size = world_size

    def answers(self, counts: Tensor, budgets: Tensor) -> Answers:
        self.lengths.append(counts.numel())
        owners = [owned_rows(len(counts), rank=rank, world_size=self.world_size) for rank in range(self.world_size)]
        shares = [choose(counts[own], budgets[own]) for own in owners]
        return Answers(*(torch.cat(columns) for columns in zip(*shares, strict=True)))


def cut(
    layers: Sequence[np.ndarray], num_ranks: int, rng: np.random.Generator, *, tree: bool = False, empty: float = 0.0
) -> World:
    """Cut every layer at random places; a share ``empty`` of the pieces, besides those of chance, is empty."""
    pieces: list[list[SegmentCodes]] = [[] for _ in range(num_ranks)]
    for index, values in enumerate(layers):
        holders = np.flatnonzero(rng.random(num_ranks) >= empty)
        if not len(holders):
            holders = np.array([0])
        borders = np.sort(rng.integers(0, len(values) + 1, len(holders) - 1))
        for rank, part in zip(holders, np.split(values, borders), strict=True):
            codes = codes_of(torch.from_numpy(part.copy()))
            # In two chunks, of which the first may be empty.
            pieces[rank].append(
                SegmentCodes(index, index, partial(torch.split, codes, [len(part) // 3, len(part) - len(part) // 3]))
            )
    sketches = [PartitionSketch(p, num_layers=len(layers)) for p in pieces]
    return World(sketches, tree=rng if tree else None)
