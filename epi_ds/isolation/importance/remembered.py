"""What is kept of the importance of finished stages, which its average forgets within a few hundred steps."""

from __future__ import annotations

from collections.abc import Iterable

from epi_ds.choices import Memory
from epi_ds.config import EPIConfig
from epi_ds.errors import UserError
from epi_ds.isolation.importance.stored import StoredImportance
from epi_ds.isolation.importance.views import Importance
from epi_ds.isolation.placement import Placement

MAXIMUM = "remembered"
_TASK = "task/"


class Remembered:
    """States of finished stages, as ``memory`` says: none, one maximum over all of them, or one of each."""

    def __init__(self, placement: Placement, config: EPIConfig) -> None:
        self._placement, self._config = placement, config
        self._states: dict[str, StoredImportance] = {}
        if config.memory is Memory.STAGE_MAX:
            self._state(MAXIMUM)

    @property
    def states(self) -> dict[str, StoredImportance]:
        """The states by the names under which they are saved."""
        return dict(self._states)

    @property
    def tasks(self) -> dict[str, StoredImportance]:
        """The states under ``memory: per_task`` by the names of their stages, in the order in which these ended."""
        return {name.removeprefix(_TASK): state for name, state in self._states.items() if name.startswith(_TASK)}

    def keep(self, stage: str | None, importance: Importance, *, step: int) -> None:
        """Take in the importance of a stage that ends; of one that ended before, the larger of both.

        step  stages that ended before, for the rounding

        Raises UserError for a stage without a name where every stage has a state of its own.
        """
        if self._config.memory is Memory.PER_TASK and not stage:
            raise UserError(
                "memory: per_task keeps the importance of every stage by its name, and the stage that ends has none; "
                "call finish_stage(name)"
            )
        state = self._state(MAXIMUM if self._config.memory is Memory.STAGE_MAX else f"{_TASK}{stage}")
        for segment in self._placement.layout.segments:
            state.raise_to(segment, importance, step=step)

    def restart(self, names: Iterable[str]) -> None:
        """Make the states those that were saved, all zero."""
        self._states = {}
        for name in names:
            self._state(name)

    def _state(self, name: str) -> StoredImportance:
        """Return a state, made of zeros where there is none."""
        config = self._config
        if name not in self._states:
            self._states[name] = StoredImportance(self._placement, config.state, seed=config.seed, purpose=name)
        return self._states[name]
