"""A pull towards an anchor by stored importance: ``target <- source + factors[code] * (w - a)``.

[Note: factors by code] What an entry is pulled by is a function of its importance, and importance that is stored in 16
bits has 65536 values: a table of their factors is computed once, and an entry looks its own up. Where several states
are stored, each has a table, and the strongest of an entry's factors counts.

Bytes per entry: 2 for the codes of each table, beside those of `pull_`. The tables are 256 kB each, of which only the
codes in use are read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from epi_ds.kernels.reference.chunks import chunks
from epi_ds.kernels.reference.code_histogram import NUM_CODES
from epi_ds.kernels.reference.codecs import PATTERN_SHIFT
from epi_ds.kernels.reference.pull import pull_


def pull_by_code_(
    target: Tensor,
    weights: Tensor,
    anchor: Tensor,
    codes: Sequence[Tensor],
    factors: Tensor,
    *,
    source: Tensor | None = None,
) -> None:
    """Do as `pull_` does, with the factor of every entry's code, in place. See [Note: factors by code].

    target   [numel]  fp32, mutated; may be ``weights``
    source   [numel]  fp32; None for the target itself
    weights  [numel]  fp32
    anchor   [numel]  fp32 or bfloat16, same device
    codes    at least one, each [numel] bfloat16 or uint16 as stored, same device, untouched
    factors  [len(codes), 65536]  fp32, same device; of all numbers that may be codes; those that are looked up are
             finite, and what lies furthest from zero is the strongest, the first of equals
    """
    for start, stop in chunks(0, target.numel()):
        strongest = _looked_up(factors[0], codes[0][start:stop])
        for of_codes, own in zip(factors[1:], codes[1:], strict=True):
            other = _looked_up(of_codes, own[start:stop])
            strongest = torch.where(other.abs() > strongest.abs(), other, strongest)
        begins = None if source is None else source[start:stop]
        pull_(target[start:stop], weights[start:stop], anchor[start:stop], strongest, source=begins)


def _looked_up(factors: Tensor, codes: Tensor) -> Tensor:
    # torch has few operations on uint16.
    return factors[codes.view(torch.int16).long() & (NUM_CODES - 1)]


def check_codes(codes: Sequence[Tensor], factors: Tensor, numel: int) -> None:
    """Raise ValueError unless every entry has a code in each of at least one table, and every code a factor."""
    for each in codes:
        if each.dtype not in PATTERN_SHIFT or each.numel() != numel:
            raise ValueError(
                f"codes are {each.numel()} of {each.dtype}; pass {numel} of {' or '.join(map(str, PATTERN_SHIFT))}"
            )
    if factors.dtype is not torch.float32 or factors.shape != (len(codes), NUM_CODES) or not codes:
        raise ValueError(
            f"factors are {list(factors.shape)} of {factors.dtype}; pass [{max(len(codes), 1)}, {NUM_CODES}] of "
            "torch.float32, a row for each of the codes, which are at least one"
        )
