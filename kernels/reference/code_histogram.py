"""How often every 16-bit code occurs: one pass over stored importance answers all questions of a refresh."""

from __future__ import annotations

import torch
from torch import Tensor

from epi_ds.kernels.reference.chunks import chunks

NUM_CODES = 1 << 16


def code_histogram_(bins: Tensor, codes: Tensor) -> Tensor:
    """Count codes, in place; return the smallest and the largest of them.

    bins   [65536]  int64, mutated: one more for every occurrence of the code that is the index
    codes  [numel]  bfloat16 or uint16 as stored, on the same device, untouched
    ->     [2]      int64 on the CPU, smallest and largest code; 65536 and -1 where there are none
    """
    smallest, largest = NUM_CODES, -1
    for start, stop in chunks(0, codes.numel()):
        # torch has few operations on uint16.
        numbers = codes[start:stop].view(torch.int16).long() & (NUM_CODES - 1)
        bins += torch.bincount(numbers, minlength=NUM_CODES)
        smallest, largest = min(smallest, int(numbers.min())), max(largest, int(numbers.max()))
    return torch.tensor([smallest, largest])
