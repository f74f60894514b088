"""How much each of two models counts in a merge, entry by entry, from the importance in a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from epi_ds.checkpoint.catalog import open_checkpoint
from epi_ds.checkpoint.shards import TagShards
from epi_ds.checkpoint.tag import open_shards
from epi_ds.errors import UserError
from epi_ds.isolation.layout import Segment
from epi_ds.kernels import decode


class FisherWeights:
    """Importance of both models, from a checkpoint of the run that made the second of the first.

    [Note: Fisher weights] Merging by Fisher information (arXiv 2111.09832) is, entry by entry,

        (lambda_A F_A w_A + lambda_B F_B w_B) / (lambda_A F_A + lambda_B F_B)

    with the diagonal of each model's Fisher matrix on its own task. Importance is that diagonal, as an average over
    steps. F_B is the ``importance`` of the checkpoint, of what was trained last. F_A is what is remembered of finished
    stages (``memory``), entry-wise the largest; without any it is 1 everywhere, since nothing says what the first model
    needs. Each is divided by its mean, so that lambda, which is 1 - alpha and alpha, weighs like with like. What the
    checkpoint does not cover counts 1 and 1, and so does an entry that neither model needs.
    """

    def __init__(self, path: Path) -> None:
        """Read the means. Raises UserError where the checkpoint holds no importance, CheckpointError where damaged."""
        tag = open_shards(open_checkpoint(path))
        self.path = tag.path
        states = tag.manifest.isolation.states
        if "importance" not in states:
            raise UserError(
                f"{tag.path} holds no importance (policy: {tag.manifest.isolation.config.get('policy')}, state: "
                f"{tag.manifest.isolation.config.get('state')}); give a checkpoint of a run that measures it"
            )
        self._shards = TagShards(*tag)
        self._segments = {s.name: s.whole for s in self._shards.shard(0).header.segments}
        self._means = {state: self._mean_of(state) for state in states}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters that importance covers."""
        return {name: segment.shape for name, segment in self._segments.items()}

    def share(self, name: str, *, alpha: float) -> Tensor:
        """Return the share of the second model in every entry. Of the parameter's shape, fp32, in [0, 1]."""
        segment = self._segments[name]
        past = [state for state in self._means if state != "importance"]
        first = torch.ones(segment.numel) if not past else torch.zeros(segment.numel)
        for state in past:
            torch.maximum(first, self._relative(state, segment), out=first)
        second = self._relative("importance", segment).mul_(alpha)
        total = second + first.mul_(1.0 - alpha)
        share = torch.where(total > 0, second / total, alpha)
        return share.clamp_(0.0, 1.0).view(segment.shape)

    def _relative(self, state: str, segment: Segment) -> Tensor:
        mean = self._means[state]
        values = decode(self._shards.stored(state, segment))
        return (values.double() / mean).float() if mean > 0 else torch.zeros_like(values)

    def _mean_of(self, state: str) -> float:
        segments = list(self._segments.values())
        total = math.fsum(decode(self._shards.stored(state, segment)).double().sum().item() for segment in segments)
        return total / max(1, sum(segment.numel for segment in segments))
