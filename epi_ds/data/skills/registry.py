"""The task families by name."""

from collections.abc import Mapping
from types import MappingProxyType

from epi_ds.data.skills.arithmetic import Arithmetic
from epi_ds.data.skills.coding import Code
from epi_ds.data.skills.dialogue import Dialogue
from epi_ds.data.skills.instruct import Instruct
from epi_ds.data.skills.logic import Logic
from epi_ds.data.skills.task import Row, Skill, Split, draw_rows
from epi_ds.errors import UserError, nearest

_ALL: tuple[Skill, ...] = (Arithmetic(), Code(), Logic(), Instruct(), Dialogue())

SKILLS: Mapping[str, Skill] = MappingProxyType({skill.name: skill for skill in _ALL})
"""Every task family by its name."""


def get_skill(name: str) -> Skill:
    """Return the task family of that name in ``SKILLS``. Raises UserError where there is none."""
    if name in SKILLS:
        return SKILLS[name]
    raise UserError(f"there is no skill {name!r}{nearest(name, SKILLS)}; there are {', '.join(SKILLS)}")


def rows(skill_name: str, *, split: Split, size: int, seed: int) -> list[Row]:
    """Draw rows of one split of a task family.

    skill_name  a key of ``SKILLS``
    size        how many rows to return, exactly; test rows repeat only once no new one turns up any more
    seed        selects the sequence of draws

    The same arguments give the same rows on every machine, a larger size extends a smaller one, and no prompt is in
    both splits, whatever the sizes and seeds. Raises ValueError if there is no such skill, or ``size`` is negative.
    """
    return draw_rows(get_skill(skill_name), split=split, size=size, seed=seed)
