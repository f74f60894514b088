"""The task families by name."""

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from epi_ds.data.skills.arithmetic import Arithmetic
from epi_ds.data.skills.coding import Code
from epi_ds.data.skills.dialogue import Dialogue
from epi_ds.data.skills.instruct import Instruct
from epi_ds.data.skills.logic import Logic
from epi_ds.data.skills.task import Row, Skill, Split, draw_rows
from epi_ds.errors import UserError

_ALL: tuple[Skill, ...] = (Arithmetic(), Code(), Logic(), Instruct(), Dialogue())

SKILLS: Mapping[str, Skill] = MappingProxyType({skill.name: skill for skill in _ALL})
"""Every task family by its name."""


def get_skill(name: str) -> Skill:
    """Return the task family of that name in ``SKILLS``. Raises ValueError where there is none."""
    if name in SKILLS:
        return SKILLS[name]
    nearest = difflib.get_close_matches(name, SKILLS, n=1, cutoff=0.0)[0]
    raise UserError(f"unknown skill {name!r}: a skill is one of {', '.join(SKILLS)}; did you mean {nearest!r}?")


def rows(skill_name: str, *, split: Split, size: int, seed: int) -> list[Row]:
    """Draw rows of one split of a task family.

    skill_name  a key of ``SKILLS``
    size        how many rows to return, exactly; test rows repeat only once no new one turns up any more
    seed        selects the sequence of draws

    The same arguments give the same rows on every machine, a larger size extends a smaller one, and no prompt is in
    both splits, whatever the sizes and seeds. Raises ValueError if there is no such skill, or ``size`` is negative.
    """
    return draw_rows(get_skill(skill_name), split=split, size=size, seed=seed)
