"""Requests as rows of tokens, and rows cut into batches: the same on all ranks, whatever their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from epi_ds.errors import UserError


class Continuation(NamedTuple):
    """A request for the log-likelihood of some tokens after others."""

    request: int
    tokens: tuple[int, ...]
    """What is scored; they follow on the end of the row, whose last token predicts the last one."""


class CutRows(NamedTuple):
    """Rows that the model is shown, and what is read off each."""

    rows: dict[tuple[int, ...], list[Continuation]]
    num_cut: int
    """Requests that lost tokens at their beginning."""


def rows_of(requests: Sequence[tuple[Sequence[int], Sequence[int]]], *, max_length: int) -> CutRows:
    """Return the rows of pairs of context and continuation, in tokens, from the longest to the shortest.

    Choices of one token after the same context are read off one row.

    Raises UserError for a continuation that has no tokens, or more than the model can be shown.
    """
    rows: dict[tuple[int, ...], list[Continuation]] = {}
    num_cut = 0
    for request, (context, continuation) in enumerate(requests):
        if not 0 < len(continuation) <= max_length:
            raise UserError(
                f"evaluation.lm_eval: a continuation has {len(continuation)} tokens, and must have 1 to {max_length}, "
                "the most that the model is shown; set max_length higher, or leave its task out"
            )
        whole = (*context, *continuation)
        num_cut += len(whole) > max_length + 1
        row = whole[-(max_length + 1) :][:-1]
        rows.setdefault(row, []).append(Continuation(request, tuple(continuation)))
    longest_first = sorted(rows, key=lambda row: (-len(row), row))
    return CutRows({row: rows[row] for row in longest_first}, num_cut)


def batches_of(lengths: Sequence[int], *, batch_size: int, batch_tokens: int) -> list[range]:
    """Cut rows into batches by their lengths, which do not rise; one that is longer than a batch has it to itself."""
    batches, first = [], 0
    while first < len(lengths):
        most = max(1, min(batch_size, batch_tokens // max(1, lengths[first])))
        batches.append(range(first, min(first + most, len(lengths))))
        first = batches[-1].stop
    return batches


class Padded(NamedTuple):
    """Rows of tokens as tensors of int64, [rows, longest]."""

    input_ids: Tensor
    attention_mask: Tensor
    """1 where there is a token."""


def padded(rows: Sequence[Sequence[int]], *, left: bool, pad: int, device: torch.device) -> Padded:
    """Pad rows on their left, as generation wants it, or on their right."""
    width = max(map(len, rows))

    def filled(row: Sequence[int], value: int) -> list[int]:
        padding = [value] * (width - len(row))
        return [*padding, *row] if left else [*row, *padding]

    ids = [filled(row, pad) for row in rows]
    mask = [filled([1] * len(row), 0) for row in rows]
    return Padded(torch.tensor(ids, device=device), torch.tensor(mask, device=device))
