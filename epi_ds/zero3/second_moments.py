"""``state: adam``: the optimizer's second moments, read as importance where they lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from epi_ds.isolation.layout import Segment
from epi_ds.zero3.optimizer_state import stepping_optimizer


class SecondMoments:
    """Reads ``exp_avg_sq`` of the sub-groups' optimizer states; zero before the first step.

    Adam's second moment is the exponential average of eq. 5 (arXiv 2604.14010), with beta2 for the decay, and of what
    the optimizer sees: gradients after clipping, and the stale ones that ZeRO-3 applies.
    """

    def __init__(self, optimizer: Any) -> None:
        """``optimizer`` is ZeRO-3's, over one of the Adams in guard.py."""
        self._optimizer = optimizer

    @property
    def decays(self) -> list[float]:
        """The effective ``ema_decay`` of each parameter group."""
        return [group["betas"][1] for group in self._optimizer.optimizer.param_groups]

    @property
    def code_shift(self) -> int:
        """See `epi_ds.isolation.importance.views.Importance`: moments are of all codes."""
        return 0

    def read(self, segment: Segment, start: int, stop: int) -> Tensor:
        """See `epi_ds.isolation.importance.views.Importance`."""
        partition = self._optimizer.fp32_partitioned_groups_flat[segment.sub_group]
        state = stepping_optimizer(self._optimizer, segment.sub_group).state.get(partition, {})
        if "exp_avg_sq" not in state:
            return torch.zeros(stop - start, device=partition.device)
        moments: Tensor = state["exp_avg_sq"][segment.start + start : segment.start + stop]
        # The square of a finite gradient may overflow; infinity would make its layer's threshold meaningless.
        return moments.float().clamp(max=torch.finfo(torch.float32).max)
