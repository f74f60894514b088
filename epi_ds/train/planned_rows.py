"""The rows of a run in their order, each with the number of its source, and batches that say it of every token."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from datasets import Dataset, concatenate_datasets
from torch.nn.functional import pad

SOURCE = "source"
"""Key of a row under which the number of its source stands."""
SOURCES = "sources"
"""Key of a batch under which stands, for every label, the number of the source that it is of."""


class Part(NamedTuple):
    """The rows of a source as one part of a run's rows, which lie end to end."""

    label: str
    rows: Dataset
    is_replayed: bool = False
    """Whether they are drawn among the rows of a stage, and are not its own."""

    @property
    def name(self) -> str:
        """What the metrics call them: the same rows may be new in one stage and replayed in another."""
        return f"{self.label} (replayed)" if self.is_replayed else self.label


class PlannedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows as tokens, read one by one where they are asked for."""

    def __init__(self, parts: Sequence[Part], order: Sequence[int]) -> None:
        """``order`` holds indices into the rows of ``parts`` laid end to end. Parts of one name are one source."""
        self._rows = concatenate_datasets([part.rows for part in parts])
        # Of millions of rows a list would be eight times as large.
        self._order = torch.tensor(order, dtype=torch.int64)
        self._ends = list(accumulate(len(part.rows) for part in parts))
        replayed = {part.name: part.is_replayed for part in parts}
        self.sources = tuple(replayed)
        """Names of the sources, by their numbers."""
        self.is_replayed = tuple(replayed.values())
        """Whether their rows are replayed."""
        self._numbers = [self.sources.index(part.name) for part in parts]

    def rows_by_source(self, start: int, stop: int) -> list[int]:
        """Return how many rows of every source there are from one position to another, by their numbers."""
        counts = [0] * len(self.sources)
        for index in self._order[start:stop].tolist():
            counts[self._number_of(index)] += 1
        return counts

    def _number_of(self, index: int) -> int:
        return self._numbers[bisect_right(self._ends, index)]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[dict[str, Any]]:
        """Return several rows at once, as torch's loader asks for them."""
        indices = self._order[positions].tolist()
        rows = self._rows.__getitems__(indices)
        return [{**row, SOURCE: self._number_of(index)} for row, index in zip(rows, indices, strict=True)]


class SourceCollator:
    """Puts rows together as another collator does, and says of every label which source it is of."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self._collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch, with `SOURCES` of the form of ``labels`` where rows have a source."""
        batch = self._collator(rows)
        if SOURCE not in rows[0]:
            return batch
        labels, numbers = batch["labels"], torch.tensor([row[SOURCE] for row in rows])
        if len(labels) == len(rows):
            batch[SOURCES] = numbers[:, None].expand_as(labels).contiguous()
        else:
            # Without padding all rows of a batch are one line.
            line = numbers.repeat_interleave(torch.tensor([len(row["input_ids"]) for row in rows]))
            batch[SOURCES] = pad(line, (0, labels.shape[1] - len(line)))[None]
        return batch
