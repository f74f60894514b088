"""What a refresh selected and found, over all ranks: the numbers of the paper's tables 11 and 12, and more."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from epi_ds.choices import ADAPTIVE
from epi_ds.config import EPIConfig
from epi_ds.isolation.counters import Counters
from epi_ds.isolation.importance.codes import decode
from epi_ds.isolation.importance.tasks import TaskShare, task_shares
from epi_ds.isolation.layout import Layout
from epi_ds.isolation.search.adaptive import Drift
from epi_ds.isolation.search.bracket import count_dtype
from epi_ds.isolation.search.compare import Comparison
from epi_ds.isolation.search.exchange import Exchange, Traffic
from epi_ds.isolation.search.sketch import Extremes
from epi_ds.isolation.search.threshold import Thresholds


class GroupCounts(NamedTuple):
    """Isolated entries of one group of parameters: a layer, or a kind of matrix."""

    name: str
    numel: int
    isolated: int
    kept: int
    """Isolated both before and now."""
    before: int
    """Isolated before."""

    @property
    def achieved_ratio(self) -> float:
        """Isolated share of the group's entries."""
        return self.isolated / self.numel if self.numel else 0.0

    @property
    def flip_rate(self) -> float | None:
        """Share of what was isolated before that was released; None where nothing was.

        The paper's table 12 does not say what its flip rate is a share of.
        """
        return 1.0 - self.kept / self.before if self.before else None


class LayerImportance(NamedTuple):
    """Importance of one layer, as selection compared it."""

    threshold: float
    """Entries at or above it are isolated; inf isolates none."""
    smallest: float
    largest: float
    largest_in: str
    """Name of the parameter that holds the largest entry."""


class RefreshReport(NamedTuple):
    """What a refresh selected, over all ranks. The same on every rank. Counts are of entries."""

    step: int
    """Applied steps before the refresh."""
    ratio: float
    """The one requested at this step."""
    budget: int
    """Most entries that the ratio allows."""
    isolated: int
    covered: int
    tied_mass: int
    """Entries that the next smaller threshold would isolate on top; see `Thresholds.tied_mass`."""
    layers: tuple[GroupCounts, ...]
    kinds: tuple[GroupCounts, ...]
    """The same entries counted by kind of matrix: all query projections, all norms, ..."""
    importance: tuple[LayerImportance, ...]
    """In the order of ``layers``."""
    tasks: tuple[TaskShare, ...]
    """What each task has of the mask, where several share the budget (``memory: per_task``)."""
    jaccard_first: float | None
    """Overlap with the first mask of the run that isolated anything, estimated from one entry in 16 (table 11)."""
    held_gradient_energy: float | None
    """``1 - |masked g|^2 / |g|^2``, mean over the steps under a mask since the last refresh; None without one."""
    held_step_energy: float | None
    """The same of the optimizer's update, under ``apply: update``, from a sample of the entries. The ranks hear of an
    update in the next step, so it is over the steps up to the last but one, and that of the window before."""
    seconds: float
    collectives: int
    sent_bytes: int
    """Bytes that this rank sent, by the model of `epi-ds estimate`."""

    @property
    def achieved_ratio(self) -> float:
        """Isolated share of the covered entries."""
        return self.isolated / self.covered

    @property
    def jaccard(self) -> float | None:
        """Overlap of the masks before and now (intersection over union); None where there was no mask before."""
        before, kept = (sum(getattr(layer, field) for layer in self.layers) for field in ("before", "kept"))
        return kept / (before + self.isolated - kept) if before else None


class Decision(NamedTuple):
    """What a look at the importance led to. The same on every rank."""

    ratio: float
    """The one that is, or would be, requested."""
    drift: Drift | None
    """How far the mask in force has drifted; None unless ``refresh_interval: adaptive``, or if nothing is isolated."""
    thresholds: Thresholds | None
    """None where the mask stays."""


class MaskCounts(NamedTuple):
    """Entries of a change of masks: this rank's, or those of all ranks. int64 on the CPU."""

    isolated: Tensor
    """[num_groups]: isolated now, by layer and then by kind."""
    kept: Tensor
    """[num_groups]: isolated both before and now."""
    first: Tensor
    """[2]: `FirstMask.compare`."""
    overlaps: Tensor
    """[tasks, tasks]: `TaskScores.overlaps`; empty where no tasks share the budget."""

    def total(self, exchange: Exchange, layout: Layout) -> MaskCounts:
        """Return the sums over the ranks. Collective."""
        largest = layout.covered_numel if len(self.overlaps) else max(layout.group_numel)
        sums = exchange.total(torch.cat([part.flatten() for part in self]).to(count_dtype(largest))).long()
        parts = torch.split(sums, [part.numel() for part in self])
        return MaskCounts(*(total.view_as(part) for total, part in zip(parts, self, strict=True)))


class Effort(NamedTuple):
    """What a refresh took."""

    seconds: float
    traffic: Traffic


def report_of(
    comparison: Comparison,
    thresholds: Thresholds,
    counts: MaskCounts,
    before: Tensor,
    *,
    ratio: float,
    counters: Counters,
    effort: Effort,
) -> RefreshReport:
    """Return what a refresh found.

    counts    over all ranks
    before    [num_groups] int64, CPU: entries isolated before, over all ranks
    ratio     the one requested
    counters  those of the window that ends
    """
    layout, tasks = comparison.layout, comparison.tasks
    num_layers, names = len(layout.layer_names), (*layout.layer_names, *layout.kind_names)
    columns = layout.group_numel, counts.isolated.tolist(), counts.kept.tolist(), before.tolist()
    groups = tuple(GroupCounts(*row) for row in zip(names, *columns, strict=True))
    both_first, either_first = counts.first.tolist()
    parameter_names = tuple(segment.name for segment in layout.segments)
    return RefreshReport(
        step=counters.applied_steps,
        ratio=ratio,
        budget=thresholds.budget,
        isolated=sum(group.isolated for group in groups[:num_layers]),
        covered=layout.covered_numel,
        tied_mass=thresholds.tied_mass,
        layers=groups[:num_layers],
        kinds=groups[num_layers:],
        importance=layer_importance(thresholds.codes, thresholds.extremes, parameter_names),
        tasks=() if tasks is None else task_shares(tasks.names, counts.overlaps),
        jaccard_first=both_first / either_first if either_first else None,
        held_gradient_energy=counters.mean_held_gradient_energy,
        held_step_energy=counters.mean_held_step_energy,
        seconds=effort.seconds,
        collectives=effort.traffic.collectives,
        sent_bytes=effort.traffic.sent_bytes,
    )


def drift_sentence(decision: Decision, config: EPIConfig) -> str | None:
    """Return what an adaptive run decided, and why; None where nothing is adaptive."""
    reasons = []
    if decision.drift is not None:
        low, high, growth = decision.drift
        verdict = "stays" if decision.thresholds is None else "is refreshed"
        reasons.append(
            f"{low:.1%} to {high:.1%} of the isolated entries lie below the threshold of now, and a new mask would "
            f"be larger by {growth:.1%} of it (max_drift {config.max_drift:.1%}): the mask {verdict}"
        )
    if config.ratio == ADAPTIVE:
        reasons.append(f"ratio {decision.ratio:.4%} holds {config.coverage:.0%} of the importance")
    return "; ".join(reasons) or None


def layer_importance(
    threshold_codes: Tensor, extremes: Extremes, parameter_names: tuple[str, ...]
) -> tuple[LayerImportance, ...]:
    """Return the importance of every layer; of a layer without entries zeros, and an empty name.

    threshold_codes  [num_layers] int64, CPU
    parameter_names  of the covered parameters, by index
    """
    columns = [values_of(codes.clamp(min=0)) for codes in (threshold_codes, extremes.min_codes, extremes.max_codes)]
    holders = [parameter_names[index] if index >= 0 else "" for index in extremes.holders.tolist()]
    return tuple(LayerImportance(*row) for row in zip(*columns, holders, strict=True))


def values_of(codes: Tensor) -> list[float]:
    """Return the values of int64 codes; inf for what no finite importance reaches."""
    # decode() reads the pattern of +inf as 2^128.
    return [value if value < 2.0**128 else math.inf for value in decode(codes).tolist()]
