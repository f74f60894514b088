"""What is kept, as rows: those that are held out to be scored, and the others, to be measured and replayed."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from epi_ds.data.sources import SkillRows
from epi_ds.data.table import Reading, Table, read_table
from epi_ds.evaluation.tasks import Task, skill_task
from epi_ds.recipe.keep import BASE
from epi_ds.recipe.models import Recipe
from epi_ds.recipe.sources import TrainingData

logger = logging.getLogger(__name__)

OWN_ROWS = "own_rows"
"""What messages and scores call the rows that the model wrote itself."""

# One row in so many is held out.
HELD_OUT_SHARE = 10


@dataclass(frozen=True)
class KeptSource:
    """One of the sources of what is kept."""

    source: TrainingData
    num_held_out: int
    """Its first rows, which are scored and nothing else."""

    @property
    def label(self) -> str:
        """What messages and scores call it."""
        return self.source.label

    def resolve(self, *, seed: int) -> Table | SkillRows:
        """Return what to read: all but the rows that are held out. Raises what `DataSource.resolve` raises."""
        found = self.source.resolve(seed=seed)
        if isinstance(found, SkillRows) or not self.num_held_out:
            return found
        limit = None if found.limit is None else found.limit - self.num_held_out
        return found._replace(skip=self.num_held_out, limit=limit)


def kept_sources(recipe: Recipe, own_rows: Path | None) -> list[KeptSource]:
    """Return the sources of what a recipe keeps, rows of the model's own last; none where it keeps nothing.

    own_rows  the file that these stand in

    Reads as many rows of every file as tells how many are to be held out, and raises what `read_table` raises.
    """
    keep = recipe.method.keep
    if keep is None:
        return []
    sources = list(keep.sources)
    if own_rows is not None:
        sources.append(TrainingData(path=str(own_rows), source=OWN_ROWS))
    return [kept_source(source, recipe) for source in sources]


def kept_source(source: TrainingData, recipe: Recipe) -> KeptSource:
    """Return one source of what a recipe keeps, with the rows of it that are held out; see `kept_sources`."""
    keep = recipe.method.keep
    is_scored = keep is not None and keep.evaluation
    return KeptSource(source, _num_held_out(source, recipe.evaluation.rows) if is_scored else 0)


def _num_held_out(source: TrainingData, most: int) -> int:
    found = source.resolve(seed=0)
    if isinstance(found, SkillRows):
        # Its test rows are others than those that are generated for training.
        return 0
    enough = most * HELD_OUT_SHARE
    limit = enough if found.limit is None else min(found.limit, enough)
    num_rows = sum(1 for _ in read_table(found._replace(limit=limit), Reading()))
    if num_rows < HELD_OUT_SHARE and os.environ.get("RANK", "0") == "0":
        logger.warning(
            "%s has %d rows to keep, of which none is held out and scored: one in %d is, and there are fewer",
            source.label,
            num_rows,
            HELD_OUT_SHARE,
        )
    return num_rows // HELD_OUT_SHARE


def kept_tasks(kept: Sequence[KeptSource], recipe: Recipe) -> list[Task]:
    """Return what is scored of what is kept: test rows of a skill by its check, other held-out rows by their loss."""
    keep = recipe.method.keep
    if keep is None or not keep.evaluation:
        return []
    tasks: list[Task] = []
    for one in kept:
        taken = sum(task.name.partition("#")[0] == f"{BASE}/{one.label}" for task in tasks)
        # No stage has a name with a stroke in it.
        name = f"{BASE}/{one.label}" + (f"#{taken + 1}" if taken else "")
        if one.source.skill is not None:
            if not taken:
                tasks.append(skill_task(name, one.source.skill, recipe.evaluation.rows))
        elif one.num_held_out:
            found = one.source.resolve(seed=0)
            assert isinstance(found, Table)
            held_out = found._replace(limit=one.num_held_out)
            tasks.append(Task(name, [row for _, row in read_table(held_out, Reading())], None))
    return tasks
