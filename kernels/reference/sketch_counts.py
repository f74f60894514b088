"""Count importance codes against a grid of edges: one partition's contribution to a mergeable sketch."""

from __future__ import annotations

import torch
from torch import Tensor

from epi_ds.kernels.reference.chunks import chunks


def sketch_counts(codes: Tensor, edges: Tensor) -> Tensor:
    """Return, for every edge, how many codes are at or above it.

    codes  [numel]      int32, non-negative, untouched
    edges  [num_edges]  int32, same device, never falling; at least one
    ->     [num_edges]  int64, same device

    Only entries between the first and the last edge are searched; a refined round therefore reads all codes but
    sorts in few of them.
    """
    num_edges = edges.numel()
    bins = torch.zeros(num_edges + 1, dtype=torch.int64, device=codes.device)
    lowest, highest = edges[0], edges[-1]
    for start, stop in chunks(0, codes.numel()):
        chunk = codes[start:stop]
        above = chunk >= highest
        bins[-1] += above.sum()
        inside = chunk[(chunk >= lowest) & ~above]
        found = torch.searchsorted(edges, inside, right=True, out_int32=True)
        bins += torch.bincount(found, minlength=num_edges + 1)
    # bins[j] counts the codes that reach exactly the first j edges; a suffix sum counts those that reach edge j.
    return bins.flip(0).cumsum(0).flip(0)[1:]
