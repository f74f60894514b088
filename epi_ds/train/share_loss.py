"""The loss of a step in which rows are replayed: the mean of the new rows' and of the replayed rows' own means.

Each counts by its share of the global batch's rows. The mean over all tokens, which is what is computed otherwise,
would let a few long replayed rows drown short answers.
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
    replayed_share: float,
    num_tokens: Any,
    device: torch.device,
) -> Tensor:
    """Return by what to multiply the loss of every token, by the number of its source. Collective.

    batches         the micro-batches of this rank in one step, with `SOURCES`
    replayed_share  of the rows of the global batch
    num_tokens      by which the sum over all tokens is divided afterwards

    float32, on ``device``. With S_new and S_replayed the sums over the tokens of all ranks, n_new and n_replayed their
    numbers and r the share, what is computed is (1 - r) S_new / n_new + r S_replayed / n_replayed. All are 1 where
    either has no tokens. One reduction of two numbers.
    """
    replayed = torch.tensor(is_replayed, device=device)
    counts = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        # The first label of a row is never predicted.
        of_replayed = replayed[batch[SOURCES][:, 1:].to(device)]
        is_learnt = batch["labels"][:, 1:].to(device) != NOT_LEARNT
        counts += torch.stack(((is_learnt & ~of_replayed).sum(), (is_learnt & of_replayed).sum()))
    dist.all_reduce(counts)
    shares = torch.tensor([1 - replayed_share, replayed_share], dtype=torch.float64, device=device)
    weights = torch.where(counts.min() > 0, shares * num_tokens / counts.clamp(min=1), 1.0).float()
    return torch.where(replayed, weights[1], weights[0])
