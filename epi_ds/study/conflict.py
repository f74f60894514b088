"""Whether the new task's gradient and those of what is kept point against each other: the paper's eqs. 2 and 15."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from epi_ds.study.gradients import SkillGradients
from epi_ds.study.measures import Cosines


class Ends(NamedTuple):
    """Gradients at the base and at the trained model, by skill."""

    base: Mapping[str, SkillGradients]
    trained: Mapping[str, SkillGradients]


def conflicts_of(ends: Ends, *, new: str, kept: tuple[str, ...]) -> dict[str, Cosines]:
    """Return the cosines of the new task with every skill that is kept."""
    base, trained = (
        {skill: _cosine(of[new].mean, of[skill].mean) for skill in kept} for of in (ends.base, ends.trained)
    )
    return {skill: Cosines(base=base[skill], trained=trained[skill]) for skill in kept}


def _cosine(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    one, other = (torch.cat([part.flatten() for part in of.values()]).double() for of in (first, second))
    lengths = one.norm() * other.norm()
    # A gradient of zero has no direction: it is against nothing.
    return float((one @ other / lengths).clamp(-1, 1)) if lengths > 0 else 0.0
