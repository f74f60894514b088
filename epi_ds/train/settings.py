"""The settings of a run over its starts: what a resume changed, and what a run says when it has ended."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from epi_ds.checkpoint.catalog import Checkpoint
from epi_ds.defaults import with_defaults
from epi_ds.errors import UserError
from epi_ds.recipe.models import Recipe
from epi_ds.train.metrics import read_metrics
from epi_ds.train.resume import is_harmless, with_default_arguments
from epi_ds.train.run_folder import RunFolder

END = "end"
"""Event of the metrics that is written when everything of a run is on the disk, the exported model included."""


class Change(NamedTuple):
    """A setting of a recipe that has another value than before."""

    key: str
    """Dotted, list positions by number."""
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} was {self.before!r}, is {self.now!r}"


def changes_since(folder: RunFolder, recipe: Recipe) -> list[Change]:
    """Return what a recipe says otherwise than the one that the run in ``folder`` was last started with.

    Empty where there was none. How many ranks train, and arguments of how a run is watched and saved, are left out.
    """
    if not folder.recipe.is_file():
        return []
    # As they come back from a file: lists for tuples.
    before, now = (
        _leaves_of({**values, "train": with_default_arguments(values["train"])})
        for values in (
            with_defaults(Recipe, json.loads(folder.recipe.read_text())),
            json.loads(recipe.model_dump_json()),
        )
    )
    return [
        Change(key, before.get(key), now.get(key))
        for key in dict.fromkeys((*before, *now))
        if before.get(key) != now.get(key) and not _is_left_out(key)
    ]


def end_of(folder: RunFolder, recipe: Recipe, *, resume: Checkpoint | None) -> str | None:
    """Return what to say of a run that has ended; None where it has not, or where something of it is gone again.

    resume  what it would continue from

    Raises UserError where it was trained with other settings than the recipe's: its files must not be taken for what
    they are not.
    """
    ended = next((line for line in read_metrics(folder.metrics) if line["event"] == END), None)
    if ended is None or resume is None or resume.step != ended["step"] or not folder.has_export:
        return None
    remedy = "Give another output to train on, or begin anew with --restart"
    if changed := changes_since(folder, recipe):
        raise UserError(
            f"{folder.root} has ended, and was trained with other settings:\n  - "
            + "\n  - ".join(map(str, changed))
            + f"\nNothing was changed there. {remedy}"
        )
    return f"{folder.root} has ended: {ended['step']} steps, the model is in {folder.export}. {remedy}"


def _leaves_of(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return dict(_joined((f"{key}.{name}" if key else str(name), part) for name, part in value.items()))
    if isinstance(value, list) and value:
        return dict(_joined((f"{key}.{index}", part) for index, part in enumerate(value)))
    return {key: value}


def _joined(parts: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    for key, part in parts:
        yield from _leaves_of(part, key).items()


def _is_left_out(key: str) -> bool:
    section, _, argument = key.partition(".")
    return section in ("ranks", "output") or (section == "train" and is_harmless(argument.partition(".")[0]))
