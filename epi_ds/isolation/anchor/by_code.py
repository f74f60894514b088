"""Importance as a function of stored 16-bit codes: a table of its values, for there are few codes and many entries.

[Note: by code] What is remembered of one stage is stored in codes, and omega is a function of its value, entry by
entry: the same for all entries of one code. Of several stages omega is that of the largest value, and grows with each
of them; so it is the largest of what a table for each stage says.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from epi_ds.isolation.anchor.omega import Rooted
from epi_ds.isolation.importance.mean import Divided
from epi_ds.isolation.importance.stored import StoredImportance
from epi_ds.isolation.importance.views import Importance, Larger
from epi_ds.kernels import NUM_CODES, Stored, decode


class ByCode(NamedTuple):
    """Where codes are stored, and the value of every one there is."""

    stored: StoredImportance
    values: Tensor
    """[65536] fp32; of codes that stand for finite values, growing with them."""


def by_code(importance: Importance, device: torch.device) -> list[ByCode]:
    """Return tables on a device, the largest of which is the importance; none where it is no function of 16-bit codes.

    See [Note: by code].
    """
    match importance:
        case StoredImportance():
            return [ByCode(importance, _all_values(importance.dtype, device))] if importance.code_shift else []
        case Divided() | Rooted():
            tables = by_code(importance.importance, device)
            return [table._replace(values=importance.of(table.values)) for table in tables]
        case Larger():
            one, other = (by_code(each, device) for each in (importance.one, importance.other))
            return [*one, *other] if one and other else []
        case _:
            return []


def _all_values(dtype: torch.dtype, device: torch.device) -> Tensor:
    # Not every backend can count in uint16.
    codes = torch.arange(NUM_CODES, dtype=torch.int32, device=device).to(torch.int16).view(dtype)
    return decode(Stored(codes, torch.zeros(0, device=device), 0))
