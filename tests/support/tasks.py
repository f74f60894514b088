"""Importance of several tasks held whole, in one process, and the mask that shares one budget among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from epi_ds.config import EPIConfig
from epi_ds.isolation.importance.codes import codes_of
from epi_ds.isolation.importance.remembered import Remembered
from epi_ds.isolation.importance.stored import StoredImportance
from epi_ds.isolation.importance.tasks import TaskShare, task_shares
from epi_ds.isolation.layout import Layout, Parameter, build_layout
from epi_ds.isolation.mask import Masks
from epi_ds.isolation.placement import Placement
from epi_ds.isolation.search.budget import find_budget
from epi_ds.isolation.search.compare import compare
from epi_ds.isolation.search.preview import take_preview
from epi_ds.kernels import Stored
from tests.support.worlds import CountingExchange

CPU = torch.device("cpu")


class WholeSelection:
    """One selection over whole parameters."""

    def __init__(
        self,
        section: Mapping[str, Any],
        *,
        present: Mapping[str, Tensor],
        finished: Mapping[str, Mapping[str, Tensor]],
    ) -> None:
        """``present`` and ``finished`` (by stage) are importance by parameter."""
        self.config = EPIConfig.model_validate({"memory": "per_task", "state": "fp32", **section})
        parameters = [Parameter(name, tuple(values.shape)) for name, values in present.items()]
        self.layout: Layout = build_layout([parameters], rank=0, world_size=1, layer=self.config.layer)
        self.placement = Placement(self.layout, (CPU,))
        self.exchange = CountingExchange()
        remembered = Remembered(self.placement, self.config)
        for stage, values in finished.items():
            remembered.keep(stage, self._state(values), step=0, exchange=self.exchange)
        masks = Masks(self.placement)
        measured = self._state(present)
        self.comparison = compare(measured, remembered, masks, config=self.config, exchange=self.exchange, step=0)
        search = self.comparison.search
        preview = take_preview(self.comparison, masks, config=self.config, near=None, staying=0)
        budget = find_budget(search, preview, config=self.config, step=0, staying=0)
        self.thresholds = search.finish(budget.entries)

    def _state(self, values: Mapping[str, Tensor]) -> StoredImportance:
        state = StoredImportance(self.placement, self.config.state, seed=0, purpose="test")
        for segment in self.layout.segments:
            state.load(segment, Stored(values[segment.name].flatten().float(), torch.zeros(0), 0), step=0)
        return state

    @property
    def threshold_codes(self) -> Tensor:
        return self.thresholds.codes

    def scores(self) -> dict[str, Tensor]:
        """Return what was compared, by parameter."""
        segments = self.layout.by_name
        return {
            name: self.comparison.compared.read(segment, 0, segment.real_numel).view(segment.shape)
            for name, segment in segments.items()
        }

    def masks(self) -> dict[str, Tensor]:
        """Return the mask, by parameter."""
        segments = self.layout.by_name
        return {
            name: codes_of(scores) >= int(self.threshold_codes[segments[name].layer])
            for name, scores in self.scores().items()
        }

    def shares(self) -> tuple[TaskShare, ...]:
        """Return what every task has."""
        tasks = self.comparison.tasks
        assert tasks is not None
        return task_shares(tasks.names, tasks.overlaps(self.threshold_codes))
