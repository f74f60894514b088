"""The loss of a step in which rows are replayed: the mean of the new rows' and of every replayed source's own means.

Each counts by its share of the global batch's rows. The mean over all tokens, which is what is computed otherwise,
would let a few long replayed rows drown short answers, new ones and those of another source that is replayed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from epi_ds.data.store import NOT_LEARNT
from epi_ds.train.planned_rows import SOURCES


def share_weights(
    batches: Sequence[Mapping[str, Tensor]],
    is_replayed: Sequence[bool],
    *,
    rows: Sequence[int],
    num_tokens: Any,
    device: torch.device,
) -> Tensor:
    """Return by what to multiply the loss of every token, by the number of its source. Collective.

    batches      the micro-batches of this rank in one step, with `SOURCES`
    is_replayed  of every source; those that are not, at least one, count as one source, as they do without replay
    rows         of every source in the global batch
    num_tokens   by which the sum over all tokens is divided afterwards

    float32, on ``device``. With S_i the sum over the tokens of source i on all ranks, n_i their number and r_i its
    share of the rows, what is computed is the sum of r_i S_i / n_i, over the sum of those r_i that have tokens at all.
    One reduction of a number for each source.
    """
    numbers = torch.arange(len(rows), device=device)
    replayed = torch.tensor(is_replayed, device=device)
    # Of the new ones the first stands for all.
    one_of = torch.where(replayed, numbers, is_replayed.index(False))
    counts = torch.zeros(len(rows), dtype=torch.float64, device=device)
    for batch in batches:
        # The first label of a row is never predicted.
        learnt = batch["labels"][:, 1:].to(device) != NOT_LEARNT
        counts += ((batch[SOURCES][:, 1:].to(device) == numbers[:, None, None]) & learnt).sum((1, 2))
    dist.all_reduce(counts)
    found = torch.stack((torch.tensor(rows, dtype=torch.float64, device=device), counts))
    # Whole numbers, whose sums do not depend on their order.
    num_rows, tokens = torch.zeros_like(found).index_add_(1, one_of, found)
    num_rows = torch.where(tokens > 0, num_rows, 0.0)
    weights = num_rows / num_rows.sum().clamp(min=1) * num_tokens / tokens.clamp(min=1)
    return weights[one_of].float()
