"""Rows of what must not be forgotten, as the plan of a run replays them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from datasets import Dataset

from epi_ds.recipe.keep import Keep
from epi_ds.recipe.models import Stage
from epi_ds.recipe.sources import TrainingData
from epi_ds.train.planned_rows import Part
from epi_ds.train.replay import Replay, exact_share
from epi_ds.train.rows import table_of
from epi_ds.train.streams import TableRows


class KeptRows(NamedTuple):
    """What is kept, and its tokenised rows."""

    keep: Keep
    sources: tuple[TrainingData, ...]
    """Those of ``keep.data``, and behind them the rows that the model wrote itself."""
    rows: tuple[Dataset, ...]
    """Of every source."""

    @property
    def table(self) -> TableRows:
        """What the rows are drawn from."""
        return table_of(self.sources, [len(one) for one in self.rows])

    @property
    def replay(self) -> Replay | None:
        """What the plan of a run needs to know; None where nothing is replayed."""
        keep = self.keep
        return Replay(exact_share(keep.replay), self.table, keep.replay_stages) if keep.replay else None


def parts_of(stages: Sequence[Stage], stage_data: Sequence[Sequence[Dataset]], kept: KeptRows | None) -> list[Part]:
    """Return all rows of a run, laid end to end as `row_order` counts them."""
    new = [
        Part(source.label, rows)
        for stage, data in zip(stages, stage_data, strict=True)
        for source, rows in zip(stage.sources, data, strict=True)
    ]
    if kept is None or not kept.keep.replay:
        return new
    replayed = [Part(source.label, rows) for source, rows in zip(kept.sources, kept.rows, strict=True)]
    if kept.keep.replay_stages:
        replayed += new
    return [*new, *(part._replace(is_replayed=True) for part in replayed)]
