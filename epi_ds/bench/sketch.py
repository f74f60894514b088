"""``epi-ds bench sketch``: how exact thresholds are, and what the formats of importance change about masks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from epi_ds.bench.one_rank import OneRank
from epi_ds.bench.training import Trained
from epi_ds.choices import Normalizer, Selection, StateFormat
from epi_ds.isolation.importance.stored import code_shift_of
from epi_ds.isolation.importance.views import Importance, code_chunks
from epi_ds.isolation.search.sketches import sketch_of
from epi_ds.isolation.search.threshold import Thresholds, find_thresholds
from epi_ds.isolation.search.traffic import compare, pick, refresh_messages

RATIOS = (0.001, 0.01, 0.05, 0.2, 0.5)
SELECTIONS = (
    (Selection.NORMALIZED_GLOBAL, Normalizer.MINMAX),
    (Selection.NORMALIZED_GLOBAL, Normalizer.MEAN),
    (Selection.RAW_GLOBAL, Normalizer.MINMAX),
    (Selection.PER_LAYER, Normalizer.MINMAX),
)
# One repetition is disturbed by neighbours on a shared machine; the median of three rarely.
_REPETITIONS = 3


class SketchRow(NamedTuple):
    """One search for thresholds, and the mask that it gives."""

    selection: str
    """With its normaliser, where it has one."""
    state: str
    ratio: float
    numel: int
    achieved_ratio: float
    rank_error: float
    """What is missing of the budget, as a share of all entries."""
    code_mass: float
    """Share of all entries that the next smaller threshold would isolate on top: ties, which are not broken."""
    passes: int
    """Exchanges, each of which asks about all entries."""
    ns_per_element: float
    """Of all passes, in one process: median of three."""
    world_size: int
    bytes_per_rank: int
    """Sent by each rank of ``world_size`` by the transport that ``auto`` picks: the model of `epi-ds estimate`."""
    jaccard: float
    """Overlap of the mask with the one of fp32 importance."""


def measure_sketches(
    trained: Trained, *, ratios: Sequence[float] = RATIOS, world_size: int = 1024
) -> Iterator[SketchRow]:
    """Search the thresholds of every selection, state and ratio over trained importance."""
    for selection, normalizer in SELECTIONS:
        for ratio in ratios:
            search = partial(_search, trained, selection=selection, normalizer=normalizer, ratio=ratio)
            exact = _mask(trained, trained.states[StateFormat.FP32], search(StateFormat.FP32).thresholds)
            for state in trained.states:
                yield _row(trained, search(state), exact, state=state, ratio=ratio, world_size=world_size)


class _Searched(NamedTuple):
    selection: Selection
    normalizer: Normalizer
    thresholds: Thresholds
    passes: int
    seconds: float


def _search(
    trained: Trained, state: StateFormat, *, selection: Selection, normalizer: Normalizer, ratio: float
) -> _Searched:
    layout, importance = trained.layout, trained.states[state]
    seconds = []
    for _ in range(_REPETITIONS):
        exchange, started = OneRank(), time.perf_counter()
        # Made anew each time: a sketch may remember.
        sketch = sketch_of(importance, layout)
        thresholds = find_thresholds(
            sketch,
            exchange,
            ratio=ratio,
            layer_numel=layout.layer_numel,
            selection=selection,
            normalizer=normalizer,
            code_shift=importance.code_shift,
        )
        seconds.append(time.perf_counter() - started)
    return _Searched(selection, normalizer, thresholds, exchange.passes, sorted(seconds)[_REPETITIONS // 2])


def _mask(trained: Trained, importance: Importance, thresholds: Thresholds) -> Tensor:
    """Return the mask of all entries, in the order of the segments. [numel] bool."""
    return torch.cat(
        [
            codes >= int(thresholds.codes[segment.layer])
            for segment in trained.layout.segments
            for codes in code_chunks(importance, segment)
        ]
    )


def _row(
    trained: Trained, searched: _Searched, exact: Tensor, *, state: StateFormat, ratio: float, world_size: int
) -> SketchRow:
    selection, normalizer, thresholds, passes, seconds = searched
    numel = trained.layout.covered_numel
    mask = _mask(trained, trained.states[state], thresholds)
    isolated = int(mask.sum())
    messages = refresh_messages(
        trained.layout.layer_numel, selection=selection, normalizer=normalizer, code_shift=code_shift_of(state)
    )
    normalized = selection is Selection.NORMALIZED_GLOBAL
    return SketchRow(
        selection=f"{selection.value}/{normalizer.value}" if normalized else selection.value,
        state=state.value,
        ratio=ratio,
        numel=numel,
        achieved_ratio=isolated / numel,
        rank_error=(thresholds.budget - isolated) / numel,
        code_mass=thresholds.tied_mass / numel,
        passes=passes,
        ns_per_element=seconds / numel * 1e9,
        world_size=world_size,
        bytes_per_rank=pick(compare(messages, selection=selection, world_size=world_size)).sent_bytes,
        jaccard=int((mask & exact).sum()) / max(1, int((mask | exact).sum())),
    )
