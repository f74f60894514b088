"""What ``engine.epi`` reports: counts, resolved layers, bytes."""

from __future__ import annotations

from typing import NamedTuple

from epi_ds.isolation.counters import Counters
from epi_ds.isolation.refresh_report import Decision, RefreshReport


class IsolationStats(NamedTuple):
    """Counts over all ranks, as of now."""

    counters: Counters
    covered: int
    """Entries that can be isolated."""
    isolated: int
    last_refresh: RefreshReport | None
    last_decision: Decision | None
    """Of the last step after which a mask could be selected; with ``refresh_interval: adaptive`` it may have stayed."""

    @property
    def achieved_ratio(self) -> float:
        """Isolated share of the covered entries."""
        return self.isolated / self.covered

    @property
    def active_share(self) -> float:
        """Share of the applied steps that ran under a mask with an isolated entry."""
        return self.counters.active_steps / max(1, self.counters.applied_steps)


class ResolvedLayer(NamedTuple):
    """A layer, and which parameters a pattern or a name has put into it."""

    name: str
    numel: int
    parameters: tuple[str, ...]


class MemoryReport(NamedTuple):
    """Bytes of isolation's state on this rank that outlive a step, measured from its tensors."""

    state_bytes: dict[str, int]
    """``importance`` where it is ours; ``remembered_relative`` under ``memory: stage_max``, or ``task/...`` for each
    finished stage under ``per_task``; ``masks``; the sample of the ``first_mask``; and what an ``anchor``
    pulls towards."""
    covered_numel: int
    """Covered entries over all ranks."""
    world_size: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(self.state_bytes.values())

    @property
    def bytes_per_parameter_share(self) -> float:
        """Bytes on this rank per covered parameter, times the world size."""
        return self.total_bytes * self.world_size / self.covered_numel
