"""``policy: momentum``: the size of the optimizer's momenta, read where they lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from epi_ds.isolation.layout import Segment
from epi_ds.zero3.optimizer_state import stepping_optimizer


class FirstMoments:
    """Reads ``|exp_avg|`` of the sub-groups' optimizer states; zero before the first step.

    All entries of a parameter group share Adam's correction for the start at zero, so it changes no order in a tensor.
    """

    code_shift = 0
    """See `epi_ds.isolation.importance.views.Importance`: momenta are of all codes."""

    def __init__(self, optimizer: Any) -> None:
        """``optimizer`` is ZeRO-3's, over one of the Adams in guard.py."""
        self._optimizer = optimizer

    def read(self, segment: Segment, start: int, stop: int) -> Tensor:
        """See `epi_ds.isolation.importance.views.Importance`."""
        partition = self._optimizer.fp32_partitioned_groups_flat[segment.sub_group]
        state = stepping_optimizer(self._optimizer, segment.sub_group).state.get(partition, {})
        if "exp_avg" not in state:
            return torch.zeros(stop - start, device=partition.device)
        momenta: Tensor = state["exp_avg"][segment.start + start : segment.start + stop]
        return momenta.float().abs().clamp(max=torch.finfo(torch.float32).max)
