"""Isolated entries and importance by attention head: rows of the projections to q, k and v, columns of the one back.

With grouped queries there are fewer heads of keys and values, each of which several heads of queries share. What a
matrix holds of several kinds at once, and what does not have as many rows or columns as the heads have, is not told
apart: other models lay it out otherwise.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig

from epi_ds.inspect.matrix_kinds import MatrixKind
from epi_ds.isolation.layout import Segment

# Names of plain linear layers, whose weight is [out, in]; GPT-2's `c_proj` is the other way round.
_LINEAR_OUTPUTS = ("o_proj", "out_proj", "out_lin", "dense", "wo", "o")


class HeadCounts(NamedTuple):
    """The attention of a model, as its configuration says it."""

    query: int
    key_value: int
    size: int
    """Entries of a head's vector."""

    def of(self, kind: MatrixKind) -> int:
        """Return how many heads a projection has; 0 for what is none."""
        if kind in (MatrixKind.QUERY, MatrixKind.ATTENTION_OUTPUT):
            return self.query
        return self.key_value if kind in (MatrixKind.KEY, MatrixKind.VALUE) else 0


class Head(NamedTuple):
    """One head's part of a projection. Counts are of entries."""

    entries: int
    isolated: int
    importance: float | None
    """Sum over its entries; None where it was not measured."""


def head_counts_of(folder: Path) -> HeadCounts | None:
    """Return the heads of the model whose configuration lies in a folder; None where none tells their number."""
    if not (folder / "config.json").is_file():
        return None
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    except (OSError, ValueError):
        return None
    query = getattr(config, "num_attention_heads", None)
    if not isinstance(query, int) or query < 1:
        return None
    key_value = getattr(config, "num_key_value_heads", None) or query
    size = getattr(config, "head_dim", None) or config.hidden_size // query
    return HeadCounts(query, key_value, size)


class HeadTally:
    """Counts of the heads of one projection."""

    def __init__(self, heads: int, *, size: int, shape: tuple[int, ...], by_column: bool) -> None:
        self._heads, self._size, self._shape, self._by_column = heads, size, shape, by_column
        # [isolated or importance, head]
        self._sums = torch.zeros((2, heads), dtype=torch.float64)
        self._is_measured = False

    def measure(self, mask: Tensor, values: Tensor | None, *, start: int) -> None:
        """Take in neighbouring entries of the flattened parameter, from ``start`` on. ``values`` are importance."""
        self._sums[0] += self._by_head(mask, start)
        if values is not None:
            self._is_measured = True
            self._sums[1] += self._by_head(values, start)

    def _by_head(self, values: Tensor, start: int) -> Tensor:
        """Return sums by head. [heads] fp64"""
        width = math.prod(self._shape[1:])
        first_row, before = divmod(start, width)
        rows = -(-(before + values.numel()) // width)
        # Filled up to whole rows.
        table = torch.zeros(rows * width, dtype=torch.float64)
        table[before : before + values.numel()] = values
        table = table.view(rows, width)
        if self._by_column:
            return table.sum(0).view(self._heads, self._size).sum(1)
        lines = torch.zeros(self._heads * self._size, dtype=torch.float64)
        lines[first_row : first_row + rows] = table.sum(1)
        return lines.view(self._heads, self._size).sum(1)

    @property
    def heads(self) -> tuple[Head, ...]:
        """What was taken in, by head."""
        entries = math.prod(self._shape) // self._heads
        isolated, importance = self._sums.tolist()
        measured = importance if self._is_measured else [None] * self._heads
        return tuple(Head(entries, int(count), total) for count, total in zip(isolated, measured, strict=True))


def head_tally(parameter: Segment, *, kind: MatrixKind, counts: HeadCounts) -> HeadTally | None:
    """Return what counts the heads of a parameter; None for one that has none, or not as the configuration says."""
    *modules, ending = parameter.name.split(".")
    heads, shape, by_column = counts.of(kind), parameter.shape, kind is MatrixKind.ATTENTION_OUTPUT
    # Of an adapter, which is named after what it adapts, no matrix has heads.
    if not heads or ending not in ("weight", "bias") or any(part.startswith("lora_") for part in modules):
        return None
    if by_column and (len(shape) != 2 or modules[-1] not in _LINEAR_OUTPUTS):
        return None
    has_heads = len(shape) <= 2 and shape[1 if by_column else 0] == heads * counts.size
    return HeadTally(heads, size=counts.size, shape=shape, by_column=by_column) if has_heads else None
