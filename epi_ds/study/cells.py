"""A cell: one arm with one seed on one target, an ordinary run in a folder of its own."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from epi_ds.anchor_config import RUN, STAGE
from epi_ds.choices import StateFormat
from epi_ds.errors import UserError, nearest
from epi_ds.policy_rules import REFRESHING, UNMEASURED
from epi_ds.recipe.document import set_key
from epi_ds.recipe.keep import Keep, ReplayLoss
from epi_ds.recipe.loading import parse_recipe
from epi_ds.recipe.models import Recipe
from epi_ds.recipe.sources import Files
from epi_ds.study.models import MERGE, Study

_BASE_SKILLS = "base_skills"
_NEVER = "no"
# The trainer saves after the last step, too; no run of a study has so many.
_AT_THE_END = 1_000_000_000


class Cell(NamedTuple):
    """What a line of the results is of."""

    arm: str
    seed: int
    target: str

    @property
    def name(self) -> str:
        """How it is told."""
        return f"{self.arm}, {self.target}, seed {self.seed}"


class WorkFolder(NamedTuple):
    """Where the cells of a study run, and what they share. Paths are absolute."""

    root: Path

    @classmethod
    def nowhere(cls) -> WorkFolder:
        """Return one for settings alone, which nothing is run in."""
        return cls(Path("/"))

    def base(self, study: Study, cell: Cell) -> Path:
        """Return the folder of the model that a cell begins with, or the id of one that there is."""
        if study.base.path is not None:
            return Path(study.base.path)
        return self.root / "bases" / _short(base_settings(study, cell))

    def own_rows(self, study: Study, cell: Cell, settings: dict[str, Any]) -> Path:
        """Return the file of rows that cells of the same base and settings share."""
        shared = {"base": base_settings(study, cell), **{k: v for k, v in settings.items() if k != "file"}}
        return self.root / "own_rows" / f"{_short(shared)}.jsonl"

    def cell(self, cell: Cell) -> Path:
        """Return the folder of a cell."""
        return self.root / "cells" / cell.target / cell.arm / f"seed_{cell.seed}"


def cells_of(
    study: Study,
    *,
    seeds: Iterable[int] | None = None,
    arms: Iterable[str] | None = None,
    targets: Iterable[str] | None = None,
) -> Iterator[Cell]:
    """Yield the cells of a study, or of some of its seeds, arms and targets, seed by seed: an early look has all arms.

    Raises UserError for a seed, an arm or a target that the study does not have.
    """
    for seed in seeds or ():
        if seed not in study.all_seeds:
            raise UserError(f"{study.name} has no seed {seed}; it has {', '.join(map(str, study.all_seeds))}")
    for arm in arms or ():
        if arm not in study.arms:
            raise UserError(f"{study.name} has no arm {arm!r}{nearest(arm, study.arms)}; see epi-ds study status")
    for target in targets or ():
        if target not in study.targets:
            raise UserError(
                f"{study.name} has no target {target!r}{nearest(target, study.targets)}; it has "
                f"{', '.join(study.targets)}"
            )
    for seed in study.all_seeds if seeds is None else seeds:
        for arm in study.arms if arms is None else arms:
            for target in study.targets if targets is None else targets:
                yield Cell(arm, seed, target)


def base_settings(study: Study, cell: Cell) -> dict[str, Any]:
    """Return what a cell's base depends on, as JSON has it."""
    if study.base.pretrain is None:
        return {"path": study.base.path}
    pretrain = study.base.pretrain.model_dump(mode="json")
    return {**pretrain, "skills": list(study.pretrained_skills(cell.target)), "seed": cell.seed}


def recipe_of(study: Study, cell: Cell, work: WorkFolder) -> dict[str, Any]:
    """Return the values of a cell's recipe: the study's, changed by the arm. Raises UserError for a wrong key."""
    kept = study.kept_skills(cell.target)
    values: dict[str, Any] = copy.deepcopy(study.recipe)
    values["model"] = {"path": str(work.base(study, cell)), "dtype": study.base.dtype}
    values["stages"] = copy.deepcopy(list(study.targets[cell.target]))
    values["ranks"] = study.ranks
    values["output"] = str(work.cell(cell) / "run")
    set_key(values, "evaluation.skills", list(kept))
    if study.base.kept:
        set_key(values, "evaluation.tasks", copy.deepcopy(study.base.kept))
    set_key(values, "train.seed", cell.seed)
    for key, value in study.arms[cell.arm].items():
        if key == MERGE:
            continue
        set_key(values, key, _with_base_skills(copy.deepcopy(value), kept))
    keep = values.get("method", {}).get("keep") or {}
    if isinstance(keep, dict) and keep.get("self") is not None:
        own = keep["self"] if isinstance(keep["self"], dict) else {"rows": keep["self"]}
        keep["self"] = {**own, "file": str(work.own_rows(study, cell, own))}
    return values


def merge_of(study: Study, cell: Cell) -> float | None:
    """Return how much of what was trained is in the model that is scored; None where it is all of it."""
    return study.arms[cell.arm].get(MERGE)


def run_of(study: Study, cell: Cell, work: WorkFolder) -> dict[str, Any]:
    """Return the recipe of a cell as it runs: one that measures importance leaves it in a checkpoint of its last step.

    That changes no score, so that it is no part of the digest. What it costs is a second or two.
    """
    values = recipe_of(study, cell, work)
    method = validated(study, cell, work).method.epi
    measures = method.policy in REFRESHING - UNMEASURED and method.state is not StateFormat.ADAM
    if measures and values.get("train", {}).get("save_strategy") == _NEVER:
        set_key(values, "train.save_strategy", "steps")
        set_key(values, "train.save_steps", _AT_THE_END)
    return values


def validated(study: Study, cell: Cell, work: WorkFolder, *, files: Files = Files.MUST_BE_THERE) -> Recipe:
    """Return a cell's recipe. Raises one UserError that names the arm and all that is wrong with it."""
    return parse_recipe(recipe_of(study, cell, work), place=f"arm {cell.arm} of the study {study.name}", files=files)


def digest_of(study: Study, cell: Cell) -> str:
    """Return the SHA-256 of all settings that a cell's scores depend on, defaults included: no path is among them.

    Scores under other settings are not taken for these.
    """
    # Tables are made without the data.
    parsed = validated(study, cell, WorkFolder.nowhere(), files=Files.ARE_NOT_LOOKED_FOR)
    recipe = parsed.model_dump(mode="json")
    del recipe["output"]
    recipe["model"]["path"] = base_settings(study, cell)
    if own := (recipe["method"]["keep"] or {}).get("self"):
        own["file"] = None
    if _replays_several(parsed.method.keep):
        # Earlier lines are of one mean over all that is replayed.
        recipe["method"]["keep"]["replay_loss"] = "share of every source"
    if (anchor := recipe["method"]["epi"]["anchor"]) and anchor["to"] == STAGE and len(parsed.stages) == 1:
        # The same weights.
        anchor["to"] = RUN
    # Scored beside what a study compares.
    del recipe["evaluation"]["lm_eval"]
    # Lines of before there were any have a digest without.
    if not recipe["evaluation"]["tasks"]:
        del recipe["evaluation"]["tasks"]
    if (alpha := merge_of(study, cell)) is not None:
        recipe[MERGE] = alpha
    return hashlib.sha256(_canonical(recipe).encode()).hexdigest()


def _replays_several(keep: Keep | None) -> bool:
    """Whether several sources are replayed, each with its share of the loss."""
    if keep is None or not keep.replay or keep.replay_loss is not ReplayLoss.SHARE:
        return False
    return len(keep.sources) + (keep.self is not None) + keep.replay_stages > 1


def own_rows_of(recipe: dict[str, Any]) -> Path | None:
    """Return the file of own rows that a recipe of `recipe_of` names; None where it wants none."""
    own = (recipe.get("method", {}).get("keep") or {}).get("self")
    return None if own is None else Path(own["file"])


def _with_base_skills(value: Any, skills: tuple[str, ...]) -> Any:
    """Put a source of every skill in the place of ``{base_skills: {...}}``, in mappings within too."""
    if not isinstance(value, dict):
        return value
    if _BASE_SKILLS in value:
        if len(value) != 1 or not isinstance(value[_BASE_SKILLS], dict):
            raise UserError(f"{_BASE_SKILLS} stands alone, over what each source has: {{{_BASE_SKILLS}: {{rows: 64}}}}")
        return [{"skill": skill, **value[_BASE_SKILLS]} for skill in skills]
    return {key: _with_base_skills(part, skills) for key, part in value.items()}


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _short(value: Any) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()[:16]
