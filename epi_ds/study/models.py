"""The study: which arms of one recipe run over which seeds and targets, and what is compared. Frozen values."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from epi_ds.data.skills import get_skill
from epi_ds.errors import UserError, nearest

_FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


MERGE = "merge"
"""The key of an arm that is no recipe's."""


class Protocol(StrEnum):
    """What a run is, and so what its two scores are."""

    ONE_NEW_TASK = "one_new_task"
    STAGES = "stages"


class Pretraining(BaseModel):
    """How the small Llama is made that is fine-tuned: trained on all tokens of the skills' rows."""

    model_config = _FROZEN

    steps: int = Field(ge=1)
    """Optimizer steps."""
    batch_size: int = Field(32, ge=1)
    """Rows in each of them."""
    learning_rate: float = Field(2e-3, gt=0)
    """Peak of a cosine."""
    rows: int = Field(6000, ge=1)
    """Rows of every skill that are drawn from."""
    hidden_size: int = Field(128, ge=8, multiple_of=8)
    """Width of the model; of its feed-forward layers 2.75 times as much."""
    num_hidden_layers: int = Field(3, ge=1)
    """Its depth."""


class Base(BaseModel):
    """The model that every cell begins with, and what it can."""

    model_config = _FROZEN

    skills: tuple[str, ...] = ()
    """Skills that it knows, and of which ``kept`` is the mean. Those that a target trains are left out: of the
    pretraining under ``one_new_task``, of ``kept`` under both protocols."""
    kept: dict[str, dict[str, Any]] = {}
    """Name -> held-out rows of what else it can, which count in ``kept`` as much as a skill does: the recipe's
    ``evaluation.tasks``."""
    pretrain: Pretraining | None = None
    """Make a small Llama, one for every seed and set of skills."""
    path: str | None = None
    """Or a model that there is: a folder, or a hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Precision of its weights as they are loaded; ``train.bf16`` of ``recipe`` decides what they are trained in."""

    @field_validator("skills")
    @classmethod
    def _known_skills(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(get_skill(name).name for name in names)

    @model_validator(mode="after")
    def _one_of_two(self) -> Base:
        if (self.pretrain is None) == (self.path is None):
            given = "neither is" if self.path is None else "both are"
            raise UserError(f"base is made by pretrain or read from path, and {given} given; give one of them")
        return self


class Seeds(BaseModel):
    """Seeds of the base, of the order of rows and of everything else that is random in a run."""

    model_config = _FROZEN

    choose: tuple[int, ...]
    """Those that settings are chosen on."""
    report: tuple[int, ...] = ()
    """Fresh ones, which say what the chosen settings are worth."""

    @model_validator(mode="after")
    def _are_apart(self) -> Seeds:
        if both := sorted(set(self.choose) & set(self.report)):
            raise UserError(
                f"seed {both[0]} is in choose and in report, so it would confirm what was chosen on it; give another"
            )
        return self


class Primary(BaseModel):
    """The one comparison that was decided on before the fresh seeds ran."""

    model_config = _FROZEN

    sweep: str
    """Which sweep is compared with the frontier of plain fine-tuning."""
    level: float = Field(gt=0, le=1)
    """At which share of what the ``best`` plain arm gains."""


class Study(BaseModel):
    """Arms of a recipe, seeds and targets, and what is compared."""

    model_config = _FROZEN

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    """What results and folders are called."""
    protocol: Protocol
    """``one_new_task``: one stage on a task that the base does not know; ``stages``: several, one after another."""
    base: Base
    """The model that is fine-tuned."""
    recipe: dict[str, Any] = {}
    """Keys of a recipe that all cells share: ``train``, ``evaluation``, ``method``. ``model``, ``stages``, ``output``
    and ``ranks`` are the study's."""
    ranks: int = Field(1, ge=1)
    """Of every cell, on one machine. Of several ranks, cells run one after another unless ``--jobs`` says otherwise."""
    targets: dict[str, tuple[dict[str, Any], ...]]
    """Name of a target -> the recipe's ``stages`` that train it: one of them under ``one_new_task``."""
    seeds: Seeds
    """Which seeds there are."""
    arms: dict[str, dict[str, Any]]
    """Name of an arm -> what it changes in the recipe: dotted keys, as ``epi-ds train`` takes them. Where a key wants
    sources of data, ``{base_skills: {rows: 64}}`` stands for so many rows of every skill that ``kept`` is of. The key
    ``merge: 0.5`` has the model scored that is halfway between the base and what was trained (`epi-ds merge`)."""
    frontier: tuple[str, ...]
    """Arms of plain fine-tuning, whose scores, those within runs too, are what protection must beat."""
    best: str = "full_lr_1"
    """The plain arm with the best new-task score, of whose gain ``levels`` are shares."""
    sweeps: dict[str, tuple[str, ...]] = {}
    """Name of a protection -> its arms, at least three, from weak to strong."""
    levels: tuple[float, ...] = (0.8, 0.9)
    """Shares of the gain of ``best`` at which what is kept is compared."""
    rates: dict[str, tuple[str, ...]] = {}
    """Name of a protection -> its arms at several values of ``train.learning_rate``: how wide the rates are at which
    it learns and keeps as much as at its best."""
    primary: Primary | None = None
    """All other comparisons are corrected for their number (Holm)."""
    drawn: tuple[str, ...] | None = None
    """Arms of the picture; all of them where none are given, which with dozens takes good eyes."""

    @field_validator("recipe")
    @classmethod
    def _keys_of_the_study(cls, recipe: dict[str, Any]) -> dict[str, Any]:
        for key in ("model", "stages", "output", "ranks"):
            if key in recipe:
                raise UserError(f"{key} is the study's to give; remove it (base, targets and arms say it)")
        return recipe

    @model_validator(mode="after")
    def _names_are_of_arms(self) -> Study:
        named = {"frontier": self.frontier, "best": (self.best,), "drawn": self.drawn or ()}
        named |= {f"sweeps.{name}": arms for name, arms in self.sweeps.items()}
        named |= {f"rates.{name}": arms for name, arms in self.rates.items()}
        for place, arms in named.items():
            for arm in arms:
                if arm not in self.arms:
                    raise UserError(f"{place} names the arm {arm!r}, which there is not{nearest(arm, self.arms)}")
        if self.best not in self.frontier:
            raise UserError(f"best is a plain arm, and {self.best} is not in frontier; add it, or name another")
        for name, arms in self.sweeps.items():
            if len(set(arms)) < 3:
                raise UserError(f"sweeps.{name} has {len(set(arms))} arms, and a curve takes at least three strengths")
        for name, arms in self.rates.items():
            if len(set(arms)) < 3:
                raise UserError(f"rates.{name} has {len(set(arms))} arms, and a width takes at least three rates")
            for arm in arms:
                if "learning_rate" not in self.recipe.get("train", {}) and "train.learning_rate" not in self.arms[arm]:
                    raise UserError(f"rates.{name}: {arm} has no train.learning_rate of its own; give it, or in recipe")
        primary = self.primary
        if primary is not None and primary.sweep not in self.sweeps:
            raise UserError(
                f"primary names the sweep {primary.sweep!r}, which there is not{nearest(primary.sweep, self.sweeps)}"
            )
        if primary is not None and primary.level not in self.levels:
            raise UserError(f"primary is compared at {primary.level}, which levels do not hold; add it there")
        return self

    @model_validator(mode="after")
    def _merges_have_one_end(self) -> Study:
        for name, arm in self.arms.items():
            if MERGE not in arm:
                continue
            alpha = arm[MERGE]
            if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha < 1:
                raise UserError(f"arms.{name}.{MERGE} is {alpha!r}, and a share of what was trained lies in (0, 1)")
            if self.protocol is not Protocol.ONE_NEW_TASK:
                raise UserError(
                    f"arms.{name}.{MERGE} merges at the run's end, and under stages each has an end of its own that "
                    "counts; leave it out"
                )
        return self

    @model_validator(mode="after")
    def _targets_fit_the_protocol(self) -> Study:
        if not self.targets:
            raise UserError("targets must hold at least one target")
        for name, stages in self.targets.items():
            if self.protocol is Protocol.ONE_NEW_TASK and len(stages) != 1:
                raise UserError(f"targets.{name} has {len(stages)} stages, and one_new_task is one; use stages")
            if self.protocol is Protocol.STAGES and len(stages) < 2:
                raise UserError(f"targets.{name} has {len(stages)} stage, and an order has two or more")
            if self.protocol is Protocol.ONE_NEW_TASK and not self.kept_tasks(name):
                raise UserError(
                    f"targets.{name} trains every skill of base, and base.kept has no rows, so nothing is left that "
                    "could be kept; add either"
                )
        return self

    def trained_skills(self, target: str) -> set[str]:
        """Return the built-in skills that a target's stages train."""
        return set(_skills_in(stage.get("data") for stage in self.targets[target]))

    def kept_skills(self, target: str) -> tuple[str, ...]:
        """Return the base's skills that a target does not train: what it may forget, and cannot learn anew."""
        trained = self.trained_skills(target)
        return tuple(skill for skill in self.base.skills if skill not in trained)

    def kept_tasks(self, target: str) -> tuple[str, ...]:
        """Return the names of all that ``kept`` is the mean of, but for earlier stages."""
        return (*self.kept_skills(target), *self.base.kept)

    def pretrained_skills(self, target: str) -> tuple[str, ...]:
        """Return what the base of a target is pretrained on."""
        return self.kept_skills(target) if self.protocol is Protocol.ONE_NEW_TASK else self.base.skills

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """Every seed: those to choose on first."""
        return (*self.seeds.choose, *self.seeds.report)


def _skills_in(sources: Any) -> Iterator[str]:
    for source in sources:
        if isinstance(source, dict):
            source = [source]
        yield from (one["skill"] for one in source or () if isinstance(one, dict) and "skill" in one)
