"""What is launched: a recipe, or a script of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from epi_ds.errors import UserError
from epi_ds.recipe.loading import load_recipe
from epi_ds.recipe.models import Recipe

_COMMAND = ("-m", "epi_ds.cli.main")


class Target(NamedTuple):
    """A recipe or a script, with its arguments."""

    given: str
    """As the user named it."""
    arguments: tuple[str, ...]
    folder: Path
    """Where the run writes; of a script, where its job's files go."""
    recipe: Recipe | None
    """None for a script."""
    options: tuple[str, ...] = ()
    """Of ``epi-ds`` itself, before its verb."""

    @property
    def name(self) -> str:
        """What to call a job of it."""
        return Path(self.given).stem

    @property
    def command(self) -> tuple[str, ...]:
        """Return the arguments of ``python -m epi_ds.launch.rank``."""
        train = () if self.recipe is None else (*_COMMAND, *self.options, "train")
        return (*train, self.given, *self.arguments)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the recipe's stages."""
        return () if self.recipe is None else tuple(stage.name for stage in self.recipe.stages)

    def ranks_per_node(self, nodes: int) -> int:
        """Return how many of the recipe's ranks each of so many nodes takes; 1 where there is no number."""
        ranks = self.recipe.ranks if self.recipe is not None else None
        return max(1, (ranks or 1) // nodes)

    def until(self, stage: str) -> tuple[str, ...]:
        """Return the command that stops after a stage of the recipe."""
        return (*self.command, f"--until={stage}")


def find_target(text: str, arguments: Sequence[str], *, options: Sequence[str] = ()) -> Target:
    """Return what ``text`` names: a script that ends in .py, else a recipe, by path or by the name of a shipped one.

    arguments  overrides of a recipe, which is read and checked with them; else the script's own
    options    of ``epi-ds`` itself, for the ranks of a recipe

    Raises UserError for a script that is not there, and listing everything that is wrong with a recipe.
    """
    path = Path(text)
    if path.suffix == ".py":
        if not path.is_file():
            raise UserError(f"there is no script {text}")
        return Target(text, tuple(arguments), Path("runs") / path.stem, None)
    recipe = load_recipe(text, arguments)
    return Target(text, tuple(arguments), Path(recipe.output), recipe, tuple(options))
