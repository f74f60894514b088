"""What a checkpoint remembers of finished stages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from epi_ds.checkpoint.manifest import Manifest
from epi_ds.checkpoint.shards import TagShards
from epi_ds.inspect.sources import IMPORTANCE
from epi_ds.inspect.tally import Spread, Tally
from epi_ds.isolation.importance.remembered import RELATIVE, TASK, UNDIVIDED
from epi_ds.isolation.layout import Segment
from epi_ds.kernels import chunks, decode

_MAXIMA = {
    RELATIVE: "the maximum over all finished stages, each divided by its mean",
    UNDIVIDED: "the maximum over all finished stages",
}


class RememberedState(NamedTuple):
    """One state of finished stages."""

    name: str
    """Of the stage, or what the state is where it is of several."""
    entries: int
    importance: Spread


def remembered_in(manifest: Manifest, shards: TagShards, segments: tuple[Segment, ...]) -> Iterator[RememberedState]:
    """Yield the states that the shards hold of finished stages; none of a run in which no stage has ended."""
    if not manifest.counters.finished_stages:
        return
    for state in manifest.isolation.states:
        if state == IMPORTANCE:
            continue
        tally = Tally()
        for segment in segments:
            for part in slices_of(segment):
                values = decode(shards.stored(state, part))
                nothing = torch.zeros(values.numel(), dtype=torch.bool)
                tally.measure(values, nothing, name=part.name, shape=part.shape, start=part.global_start)
        if (spread := tally.spread) is not None:
            yield RememberedState(_MAXIMA.get(state, state.removeprefix(TASK)), tally.entries, spread)


def slices_of(segment: Segment) -> Iterator[Segment]:
    """Yield a whole parameter in slices that are read one after another."""
    for start, stop in chunks(0, segment.numel):
        yield segment._replace(global_start=start, real_numel=stop - start)
