"""What a recipe asks for that works, and that few people mean: told once, where the run begins."""

from __future__ import annotations

import math
from collections.abc import Iterator

from epi_ds.anchor_config import RUN
from epi_ds.choices import AnchorWeight, PolicyName, Pull
from epi_ds.errors import Problem
from epi_ds.policy_rules import UNMEASURED
from epi_ds.recipe.models import Recipe

# Policies whose masks what is remembered decides.
_ASKING_NOTHING = UNMEASURED | {PolicyName.NONE}


def advice_on(recipe: Recipe) -> Iterator[Problem]:
    """Yield what to say of each such setting, with its remedy."""
    epi, keep = recipe.method.epi, recipe.method.keep
    anchor = epi.anchor
    if anchor is not None and anchor.pulls and anchor.to == RUN and len(recipe.stages) > 1:
        left = ""
        if anchor.strength is not None and anchor.pull is Pull.UPDATE and anchor.weight is AnchorWeight.UNIFORM:
            left = f", and leaves {math.exp(-anchor.strength):.0%} of it where it has no gradient of its own"
        yield Problem(
            "method.epi.anchor.to",
            "run pulls every stage to the weights before the first one: a later stage undoes what an earlier one "
            f"learnt{left}; set it to stage, to pull to where each stage began",
        )
    by_importance = anchor is not None and anchor.pulls and anchor.weight is AnchorWeight.IMPORTANCE
    if keep is not None and keep.importance and epi.policy in _ASKING_NOTHING and not by_importance:
        yield Problem(
            "method.keep.importance",
            f"it is measured before training, and nothing asks for it: policy: {epi.policy.value} isolates nothing by "
            "importance, and there is no anchor with weight: importance; set it to false to save the time",
        )
