"""What is isolated where in a checkpoint, what its importance is, and how far it has moved: from its files alone.

[Note: slices] A layer is read one parameter after another, and a parameter in slices of a million entries, whatever
ranks saved it. Files are mapped, so what is in memory is a slice of each state and the counts, however large the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from epi_ds.checkpoint.shards import TagShards
from epi_ds.inspect.distances import Origin
from epi_ds.inspect.facts import Facts, anchor_sentence, facts_of, stage_at
from epi_ds.inspect.groups import Cell, Counts, Group, Grouping, Projection
from epi_ds.inspect.heads import HeadCounts, HeadTally, head_counts_of, head_tally
from epi_ds.inspect.matrix_kinds import MatrixKind, matrix_kind
from epi_ds.inspect.remembered_stages import RememberedState, remembered_in, slices_of
from epi_ds.inspect.sources import Opened, Read, Unknown, importance_of, origin_of, weights_of
from epi_ds.isolation.layout import Segment, assign_layers, kind_of
from epi_ds.isolation.refresh_report import values_of


@dataclass(frozen=True)
class Inspection:
    """All that is known of a checkpoint."""

    checkpoint: Path
    passed_over: tuple[str, ...]
    """Why newer checkpoints of the folder were not taken."""
    facts: Facts
    whole: Group
    layers: tuple[Group, ...]
    kinds: tuple[Group, ...]
    cells: tuple[Cell, ...]
    """By layer and kind; those without entries are left out."""
    other_kinds: tuple[str, ...]
    """What the parameters of `MatrixKind.OTHER` are called in their blocks."""
    heads: HeadCounts | None
    projections: tuple[Projection, ...]
    """Those that can be told by head."""
    remembered: tuple[RememberedState, ...]
    anchor: str
    """What weights are pulled towards, in words."""
    origin: str | None
    """Where distances are measured from; None where that is unknown."""
    without_origin: tuple[str, ...]
    """Parameters that are not there, so that their distance is unknown."""
    unknown: Mapping[str, str]
    """Why something is not told, and how to get it: of ``importance``, ``distance``, ``heads``."""


class _Reader:
    """Reads the parameters of an opened checkpoint."""

    def __init__(self, opened: Opened, *, base: Path | None) -> None:
        self.shards = TagShards(*opened.tag)
        self._saved = self.shards.shard(0).header.segments
        self.segments = tuple(segment.whole for segment in self._saved)
        self.importance: Read | Unknown = importance_of(opened, self.shards, self.segments)
        self.origin: Origin | Unknown = origin_of(opened, self.shards, self.segments, base=base)
        self._weights = None if isinstance(self.origin, Unknown) else weights_of(opened)

    def layers(self, layer: str | Mapping[str, str]) -> Iterator[tuple[str, list[Segment]]]:
        """Yield the layers with their parameters. ``layer`` is the setting they were made by."""
        names = assign_layers([segment.name for segment in self._saved], layer)
        members: dict[int, list[Segment]] = {}
        by_number = {}
        for saved, whole, name in zip(self._saved, self.segments, names, strict=True):
            members.setdefault(saved.layer, []).append(whole)
            by_number[saved.layer] = name
        for number in sorted(members):
            yield by_number[number], members[number]

    def count(self, parameter: Segment, heads: HeadTally | None) -> Counts:
        """Count one parameter. See [Note: slices]."""
        counts, origin = Counts(), self.origin
        begin = None if isinstance(origin, Unknown) or not origin.has(parameter) else origin.read
        for part in slices_of(parameter):
            mask, values = self.shards.mask(part), None
            if isinstance(self.importance, Unknown):
                counts.entries.count(mask)
            else:
                values = self.importance(part)
                counts.entries.measure(values, mask, name=part.name, shape=part.shape, start=part.global_start)
            if heads is not None:
                heads.measure(mask, values, start=part.global_start)
            if self._weights is not None and begin is not None:
                counts.distance.measure(begin(part), self._weights(part), mask, name=part.name)
        return counts

    @property
    def lacking(self) -> tuple[str, ...]:
        """Names of the parameters that began elsewhere than at an origin that is known."""
        origin = self.origin
        if isinstance(origin, Unknown):
            return ()
        return tuple(segment.name for segment in self.segments if not origin.has(segment))


def inspect_checkpoint(
    opened: Opened, *, base: Path | None = None, metrics: Iterable[Mapping[str, Any]] = ()
) -> Inspection:
    """Read an opened checkpoint, its importance and masks once.

    base     folder of the model that training began with, for distances from it and for the number of heads
    metrics  lines of the run's metrics, which say the stage

    Raises UserError where ``base`` is no model, or another one.
    """
    manifest = opened.tag.manifest
    facts = facts_of(manifest, stage=stage_at(metrics, manifest.step))
    reader = _Reader(opened, base=base)
    head_counts = _head_counts(opened.checkpoint, base)
    codes = manifest.isolation.threshold_codes or {}
    groups = Grouping(dict(zip(codes, values_of(torch.tensor(list(codes.values()), dtype=torch.int64)), strict=True)))
    projections = []
    for layer, parameters in reader.layers(facts.settings["layer"]):
        for parameter in parameters:
            kind = matrix_kind(parameter.name)
            heads = None if head_counts is None else head_tally(parameter, kind=kind, counts=head_counts)
            groups.add(kind, reader.count(parameter, heads))
            if heads is not None:
                projections.append(Projection(parameter.name, layer, kind, heads.heads))
        groups.end_layer(layer)
    return Inspection(
        checkpoint=opened.checkpoint,
        passed_over=opened.passed_over,
        facts=facts,
        whole=groups.whole,
        layers=tuple(groups.layers),
        kinds=groups.kinds,
        cells=tuple(groups.cells),
        other_kinds=_other_kinds(reader.segments),
        heads=head_counts,
        projections=tuple(projections),
        remembered=tuple(remembered_in(manifest, reader.shards, reader.segments)),
        anchor=anchor_sentence(manifest),
        origin=None if isinstance(reader.origin, Unknown) else reader.origin.label,
        without_origin=reader.lacking,
        unknown=_unknown(reader, head_counts, has_projections=bool(projections)),
    )


def _head_counts(*folders: Path | None) -> HeadCounts | None:
    """Return the heads that the first folder tells that has a configuration of a model."""
    found = (head_counts_of(folder) for folder in folders if folder is not None)
    return next((counts for counts in found if counts is not None), None)


def _other_kinds(parameters: Iterable[Segment]) -> tuple[str, ...]:
    names = (one.name for one in parameters)
    return tuple(dict.fromkeys(kind_of(name) for name in names if matrix_kind(name) is MatrixKind.OTHER))


def _unknown(reader: _Reader, heads: HeadCounts | None, *, has_projections: bool) -> dict[str, str]:
    """Return the sentences of `Inspection.unknown`."""
    found = {}
    if isinstance(reader.importance, Unknown):
        found["importance"] = reader.importance.reason
    if isinstance(reader.origin, Unknown):
        found["distance"] = reader.origin.reason
    if heads is None:
        found["heads"] = "no config.json beside the checkpoint tells their number; give the model's folder (--base)"
    elif not has_projections:
        found["heads"] = "no covered projection has as many rows or columns as the heads of the configuration"
    return found
