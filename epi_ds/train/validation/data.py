"""The rows of a recipe, source by source: read, rendered and tokenised as a run does it, and counted."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from epi_ds.data.sources import SkillRows
from epi_ds.data.table import Reading, describe, read_table
from epi_ds.evaluation.kept import KeptSource, kept_source
from epi_ds.evaluation.tasks import stage_task, task_of
from epi_ds.recipe.models import Recipe
from epi_ds.recipe.sources import DataSource, TrainingData
from epi_ds.train.own_rows import own_rows_file
from epi_ds.train.rows import RowArguments, prepare_here, rows_in
from epi_ds.train.run_folder import RunFolder
from epi_ds.train.validation.findings import Findings

_KEEP = "method.keep"


class Rows(NamedTuple):
    """How much a source has."""

    num_rows: int
    """That permutations are of: packed ones, where rows are packed. Without a tokenizer those that were read."""
    num_tokens: int | None
    """Of all of them; None without a tokenizer."""


class Data(NamedTuple):
    """How much the sources of a recipe have; None for one that cannot be read here."""

    stages: tuple[tuple[Rows | None, ...], ...]
    """Of every stage's sources."""
    kept: tuple[Rows | None, ...]
    """Of what is kept, rows of the model's own last; without those that are held out."""


class _Reader(NamedTuple):
    """Reads sources, and tells what is wrong with them."""

    arguments: RowArguments | None
    tokenizer: Any
    findings: Findings

    def rows_of(self, source: DataSource | KeptSource, key: str) -> Rows | None:
        """Return how much a source has that stands under ``key``."""
        with self.findings.told(key):
            if self.tokenizer is None or self.arguments is None:
                return self._read(source, key)
            found = rows_in(prepare_here([source], self.arguments, self.tokenizer)[0])
            self._warn(key, found.summary.told)
            return Rows(len(found.rows), found.summary.num_tokens)
        return None

    def _read(self, source: DataSource | KeptSource, key: str) -> Rows:
        """Count the rows of a source that cannot be tokenised here."""
        table = source.resolve(seed=0)
        if isinstance(table, SkillRows):
            return Rows(table.size, None)
        reading = Reading()
        count = sum(1 for _ in read_table(table, reading))
        self._warn(key, describe(table, reading))
        return Rows(count, None)

    def _warn(self, key: str, told: Sequence[tuple[int, str]] | Iterator[tuple[int, str]]) -> None:
        for level, text in told:
            if level >= logging.WARNING:
                self.findings.warning(key, text)


def check_data(recipe: Recipe, arguments: RowArguments | None, tokenizer: Any, findings: Findings) -> Data:
    """Read all rows of a recipe: what is trained, what is kept, what is scored.

    Rows are prepared as a run does, which then finds them. Without a tokenizer they are read and counted only.
    """
    reader = _Reader(arguments, tokenizer, findings)
    stages = []
    for index, stage in enumerate(recipe.stages):
        keys = keys_of(stage.data, f"stages.{index}.data")
        stages.append(tuple(reader.rows_of(one, key) for one, key in zip(stage.sources, keys, strict=True)))
    if recipe.method.probe is not None:
        reader.rows_of(recipe.method.probe, "method.probe")
    kept = tuple(_kept(recipe, reader))
    _check_tasks(recipe, findings)
    return Data(tuple(stages), kept)


def keys_of(data: TrainingData | tuple[TrainingData, ...] | None, key: str) -> list[str]:
    """Return the keys of the sources that stand under ``key``: itself where it holds one."""
    if data is None:
        return []
    return [f"{key}.{index}" for index in range(len(data))] if isinstance(data, tuple) else [key]


def _kept(recipe: Recipe, reader: _Reader) -> Iterator[Rows | None]:
    keep = recipe.method.keep
    if keep is None:
        return
    sources = list(zip(keep.sources, keys_of(keep.data, f"{_KEEP}.data"), strict=True))
    file = own_rows_file(recipe, RunFolder(Path(recipe.output)))
    if file is not None and file.exists():
        sources.append((TrainingData(path=str(file)), f"{_KEEP}.self"))
    for source, key in sources:
        found = None
        with reader.findings.told(key):
            found = kept_source(source, recipe)
        yield None if found is None else reader.rows_of(found, key)
    if keep.self is not None and file is not None and not file.exists():
        reader.findings.unchecked(
            f"{_KEEP}.self", f"the {keep.self.rows} rows that the model writes itself before training"
        )
        yield Rows(keep.self.rows, None)


def _check_tasks(recipe: Recipe, findings: Findings) -> None:
    for index, stage in enumerate(recipe.stages):
        with findings.told(f"stages.{index}.evaluation"):
            stage_task(stage, recipe)
    for name, source in recipe.evaluation.tasks.items():
        with findings.told(f"evaluation.tasks.{name}"):
            task_of(name, source)
    if recipe.evaluation.lm_eval is not None:
        findings.unchecked("evaluation.lm_eval", "the tasks of lm-evaluation-harness, whose rows are fetched by a run")
