"""All that is wrong with a recipe's keys and plain values, also behind what is wrong at first sight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from epi_ds.errors import Problem
from epi_ds.recipe.document import without
from epi_ds.recipe.loading import check_recipe
from epi_ds.recipe.models import Recipe
from epi_ds.recipe.sources import Files

# Sections that are looked at together with others, and have defaults that may not go with them.
_TOGETHER = ("method", "train", "evaluation")


class Remainder(NamedTuple):
    """What is left of a recipe without the values that are wrong."""

    recipe: Recipe | None
    """To check data by; None where it is no recipe without them."""
    problems: list[Problem]
    removed: tuple[str, ...]
    """Keys that are left out of it; an empty one where its sections do not go together."""


def check_thoroughly(values: Mapping[str, Any]) -> Remainder:
    """Return every problem with the values of a recipe, and the recipe that they are without the wrong ones.

    A check that several values take part in is made once each of them is right by itself. So what is wrong is left out,
    and the rest is checked again; what would follow from leaving it out is not told. Files are not looked for.
    """
    problems: list[Problem] = []
    removed: list[str] = []
    while True:
        checked = check_recipe(values, files=Files.ARE_NOT_LOOKED_FOR)
        told = [one for one in checked.problems if not any(_follows(one.key, key) for key in removed)]
        if checked.added:
            brought = f" (the preset in train.deepspeed adds {checked.settings_added} to method.epi)"
            # Of the whole, or of that section, it may be with what is not written there.
            told = [
                one._replace(text=one.text + brought) if one.key in ("", "method", "method.epi") else one
                for one in told
            ]
        problems += told
        if not checked.problems:
            return Remainder(checked.recipe, problems, tuple(removed))
        if not any(problem.key for problem in checked.problems):
            return Remainder(_of_valid_sections(values), problems, tuple(removed) or ("",))
        first = len(removed)
        for key in (problem.key for problem in checked.problems if problem.key):
            # Of two problems with one value the second finds it gone, and must not take the section with it. One that
            # a section lacks in the next round takes the section.
            if any(_is_within(key, one) for one in removed[first:]):
                continue
            rest = without(values, key)
            if rest is None:
                return Remainder(None, problems, tuple(removed))
            values = rest
            removed.append(key)


def _follows(key: str, removed: str) -> bool:
    """Whether a problem may follow from a value that was left out: it is with that one, or with what holds both.

    Settings of a method, and of DeepSpeed, go with one another; so do, of the whole recipe, those of `_TOGETHER`.
    """
    if not key:
        return removed.split(".")[0] in _TOGETHER or removed.endswith(".moments")
    if _is_within(key, removed) or _is_within(removed, key):
        return True
    sections = ("method", "train.deepspeed")
    return any(_is_within(key, section) and _is_within(removed, section) for section in sections)


def _is_within(key: str, section: str) -> bool:
    return f"{key}.".startswith(f"{section}.")


def _of_valid_sections(values: Mapping[str, Any]) -> Recipe:
    """Return a recipe whose sections are right, and do not go together: to check each of them further."""
    context = Files.ARE_NOT_LOOKED_FOR
    annotations: dict[str, Any] = {name: field.annotation for name, field in Recipe.model_fields.items()}
    return Recipe.model_construct(
        **{
            name: TypeAdapter(annotations[name]).validate_python(value, context=context)
            for name, value in values.items()
        }
    )
