"""Sketches of what a rank has of importance: of all covered entries, of the isolated ones, of several tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from torch import Tensor

from epi_ds.isolation.importance.stored import StoredImportance
from epi_ds.isolation.importance.views import Importance, code_chunks, isolated_code_chunks
from epi_ds.isolation.layout import Layout
from epi_ds.isolation.search.histogram_sketch import HistogramSketch, StoredCodes
from epi_ds.isolation.search.sketch import PartitionSketch, SegmentCodes, Sketch


def sketch_of(importance: Importance, layout: Layout) -> Sketch:
    """Return the sketch of this rank's covered entries."""
    if isinstance(importance, StoredImportance) and importance.is_counted_by_code:
        stored = [
            StoredCodes(segment.layer, index, importance.stored(segment).codes)
            for index, segment in enumerate(layout.segments)
        ]
        return HistogramSketch(stored, num_layers=len(layout.layer_names), code_shift=importance.code_shift)
    return _sketch_of([partial(code_chunks, importance, segment) for segment in layout.segments], layout)


def sketch_of_isolated(importance: Importance, layout: Layout, bits: Sequence[Tensor]) -> Sketch:
    """Return the sketch of this rank's isolated entries; ``bits`` are the masks in force, by sub-group."""
    readers = [
        partial(isolated_code_chunks, importance, segment, bits[segment.sub_group]) for segment in layout.segments
    ]
    return _sketch_of(readers, layout)


def sketch_of_tasks(importances: Sequence[Importance], layout: Layout) -> Sketch:
    """Return one sketch of the covered entries of several tasks, whose layers are those of one task after another."""
    num_layers = len(layout.layer_names)
    codes = [
        SegmentCodes(task * num_layers + segment.layer, index, partial(code_chunks, importance, segment))
        for task, importance in enumerate(importances)
        for index, segment in enumerate(layout.segments)
    ]
    return PartitionSketch(codes, num_layers=len(importances) * num_layers)


def _sketch_of(readers: Sequence[Callable[[], Iterable[Tensor]]], layout: Layout) -> PartitionSketch:
    """Return the sketch of what one reader of codes per segment yields."""
    by_segment = enumerate(zip(layout.segments, readers, strict=True))
    codes = [SegmentCodes(segment.layer, index, read) for index, (segment, read) in by_segment]
    return PartitionSketch(codes, num_layers=len(layout.layer_names))
