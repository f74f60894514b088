"""What is kept of the importance of finished stages, which its average forgets within a few hundred steps.

[Note: own means] Under ``memory: stage_max`` every stage's importance is divided by its own mean before the maximum is
taken. Squared gradients of a task that is new are larger than those of one that the model knows, by orders of
magnitude: undivided, the maximum would be the new task's alone, and protect nothing of the old one. Tags of runs that
began before this release hold an undivided maximum, under a name of its own, and go on with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

from epi_ds.choices import Memory
from epi_ds.config import EPIConfig
from epi_ds.errors import UserError
from epi_ds.isolation.importance.mean import Divided, exact_mean
from epi_ds.isolation.importance.stored import StoredImportance
from epi_ds.isolation.importance.views import Importance, Larger
from epi_ds.isolation.placement import Placement
from epi_ds.isolation.search.exchange import Exchange

RELATIVE = "remembered_relative"
"""The maximum over finished stages, each divided by its mean. See [Note: own means]."""
UNDIVIDED = "remembered"
"""The maximum over finished stages as they are, of a run that began with it."""
TASK = "task/"
"""Begins the names of the states of finished stages under ``memory: per_task``; theirs follow."""


class Remembered:
    """States of finished stages, as ``memory`` says: none, one maximum over all of them, or one of each."""

    def __init__(self, placement: Placement, config: EPIConfig) -> None:
        self._placement, self._config = placement, config
        self._states: dict[str, StoredImportance] = {}
        self.is_empty = True
        """Whether no stage has ended."""
        if config.memory is Memory.STAGE_MAX:
            self._state(RELATIVE)

    @property
    def states(self) -> dict[str, StoredImportance]:
        """The states by the names under which they are saved."""
        return dict(self._states)

    @property
    def maximum(self) -> StoredImportance:
        """The state under ``memory: stage_max``."""
        return self._states[UNDIVIDED if UNDIVIDED in self._states else RELATIVE]

    @property
    def tasks(self) -> dict[str, StoredImportance]:
        """The states under ``memory: per_task`` by the names of their stages, in the order in which these ended."""
        return {name.removeprefix(TASK): state for name, state in self._states.items() if name.startswith(TASK)}

    def comparable(self, importance: Importance, exchange: Exchange) -> Importance:
        """Return importance as the maximum has it: divided by its mean. Collective. See [Note: own means]."""
        if self._config.memory is not Memory.STAGE_MAX or UNDIVIDED in self._states:
            return importance
        return Divided(importance, exact_mean(importance, self._placement.layout, exchange))

    def largest(self, exchange: Exchange) -> Importance | None:
        """Return the largest, entry by entry, of what is kept, each over its own mean; None where no stage has ended.

        Collective.
        """
        if self.is_empty:
            return None
        if self._config.memory is Memory.STAGE_MAX:
            return self.maximum
        layout = self._placement.layout
        relative: list[Importance] = [Divided(one, exact_mean(one, layout, exchange)) for one in self.tasks.values()]
        return reduce(Larger, relative)

    def keep(self, stage: str | None, importance: Importance, *, step: int, exchange: Exchange) -> None:
        """Take in the importance of a stage that ends; of one that ended before, the larger of both. Collective.

        step  stages that ended before, for the rounding

        Raises UserError for a stage without a name where every stage has a state of its own.
        """
        if self._config.memory is Memory.PER_TASK and not stage:
            raise UserError(
                "memory: per_task keeps the importance of every stage by its name, and the stage that ends has none; "
                "call finish_stage(name)"
            )
        stage_max = self._config.memory is Memory.STAGE_MAX
        state = self.maximum if stage_max else self._state(f"{TASK}{stage}")
        taken = self.comparable(importance, exchange)
        for segment in self._placement.layout.segments:
            state.raise_to(segment, taken, step=step)
        self.is_empty = False

    def restart(self, names: Iterable[str], *, is_empty: bool) -> None:
        """Make the states those that were saved, all zero; ``is_empty`` says whether no stage had ended."""
        self._states = {}
        for name in names:
            self._state(name)
        self.is_empty = is_empty

    def _state(self, name: str) -> StoredImportance:
        """Return a state, made of zeros where there is none."""
        config = self._config
        if name not in self._states:
            self._states[name] = StoredImportance(self._placement, config.state, seed=config.seed, purpose=name)
        return self._states[name]
