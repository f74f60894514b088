"""How a run is started, or started again."""

from __future__ import annotations

from dataclasses import dataclass, replace

from epi_ds.checkpoint.loading import AUTO
from epi_ds.errors import UserError, nearest
from epi_ds.recipe.models import Recipe


@dataclass(frozen=True)
class Start:
    """What the command line says beside the recipe. Raises UserError for options that contradict each other."""

    restart: bool = False
    """Throw away what the folder of the run holds."""
    resume_from: str = AUTO
    """See `find_resume`."""
    until: str | None = None
    """The stage after which to save and stop; None for the last one, after which the model is exported."""

    def __post_init__(self) -> None:
        if self.restart and self.resume_from != AUTO:
            raise UserError(
                f"--restart throws away what --resume {self.resume_from} would continue from; give one of them"
            )

    @property
    def arguments(self) -> list[str]:
        """The options of ``epi-ds train`` that say the same."""
        until = [] if self.until is None else [f"--until={self.until}"]
        return [f"--resume={self.resume_from}", *until, *(["--restart"] if self.restart else [])]

    def of(self, recipe: Recipe) -> Start:
        """Return the start as a recipe has it: until the last stage is until the end. Raises UserError for no stage."""
        names = [stage.name for stage in recipe.stages]
        if self.until is not None and self.until not in names:
            raise UserError(
                f"--until {self.until}: the recipe has no such stage{nearest(self.until, names)}; {', '.join(names)}"
            )
        return replace(self, until=None) if self.until == names[-1] else self
