"""Whether what a run takes for important is what old skills are sensitive to: the paper's table 15, and its mask.

Online importance averages squared gradients of what is trained now, which is to stand for the sensitivity of what was
learnt before. The base's own squared gradients on rows of an old skill are what it stands for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from epi_ds.checkpoint.catalog import checkpoints_in
from epi_ds.checkpoint.shards import TagShards
from epi_ds.checkpoint.tag import open_shards
from epi_ds.kernels import decode
from epi_ds.study.gradients import SkillGradients
from epi_ds.study.measures import Sensitivity


class LastImportance(NamedTuple):
    """What the last checkpoint of a run says of every covered entry, by parameter, flat."""

    importance: dict[str, Tensor]
    """fp32."""
    mask: dict[str, Tensor]
    """bool, True where isolated."""


def last_importance(checkpoints: Path, *, step: int) -> LastImportance | None:
    """Return importance and mask of the checkpoint of a step; None where there is none, or it holds no importance.

    checkpoints  the folder of a run's

    Raises CheckpointError for a damaged one.
    """
    found = [one for one in checkpoints_in(checkpoints) if one.problem is None and one.step == step]
    if not found:
        return None
    tag = open_shards(found[-1])
    if "importance" not in tag.manifest.isolation.states:
        return None
    shards = TagShards(*tag)
    segments = [segment.whole for segment in shards.shard(0).header.segments]
    return LastImportance(
        {segment.name: decode(shards.stored("importance", segment)) for segment in segments},
        {segment.name: shards.mask(segment) for segment in segments},
    )


def sensitivities_of(found: LastImportance, base: Mapping[str, SkillGradients]) -> dict[str, Sensitivity]:
    """Compare with the sensitivity of each of the skills whose gradients at the base are given."""
    from scipy.stats import spearmanr

    importance, mask = (torch.cat(list(of.values())) for of in found)
    compared = {}
    for skill, gradients in base.items():
        true = torch.cat([gradients.mean_square[name].flatten() for name in found.importance])
        varied = all(bool((values != values[0]).any()) for values in (importance, true))
        num_isolated = int(mask.sum())
        top = true.topk(num_isolated).indices
        compared[skill] = Sensitivity(
            rank_correlation=float(spearmanr(importance.numpy(), true.numpy()).statistic) if varied else None,
            held=float(mask[top].double().mean()) if num_isolated else None,
        )
    return compared
