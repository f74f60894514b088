"""The recipe: what is trained, on what, in which stages. Frozen values; loading.py reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from epi_ds.choices import Memory, PolicyName, Protects, StateFormat
from epi_ds.config import EPIConfig
from epi_ds.data.skills import get_skill
from epi_ds.errors import UserError
from epi_ds.recipe.harness import HarnessSection
from epi_ds.recipe.keep import BASE, Keep, ReplayLoss
from epi_ds.recipe.lora import LoraSection
from epi_ds.recipe.presets import Preset, with_preset
from epi_ds.recipe.sources import DataSource, EvaluationData, OneOrSeveral, TrainingData, check_shares, sources_of

_FROZEN = ConfigDict(frozen=True, extra="forbid")


class Moments(StrEnum):
    """What happens to the optimizer's moments when a stage begins."""

    RESET = "reset"
    CARRY = "carry"


class ModelSection(BaseModel):
    """The model to fine-tune."""

    model_config = _FROZEN

    path: str
    """A local folder or a hub id, in Hugging Face format."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights as loaded; ``train.bf16`` decides what ZeRO-3 trains in."""
    attn_implementation: str | None = None
    """Passed to ``from_pretrained``."""
    revision: str | None = None
    """Hub revision."""
    allow_missing: tuple[str, ...] = ()
    """Regular expressions of weights that the model's files may lack, such as a head that is meant to be new. Any other
    that they lack is an error: it would be trained from random values."""
    lora: LoraSection | None = None
    """Train a low-rank adapter instead of the weights: ``{r: 16, target_modules: all-linear}``. Isolation then covers
    the adapter alone. Wants the extra ``lora``."""


class Stage(BaseModel):
    """One stretch of the run with data of its own."""

    model_config = _FROZEN

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """What the report, ``--until`` and overrides call it."""
    data: OneOrSeveral
    """Its rows, or several sources of them."""
    evaluation: EvaluationData | None = None
    """Default: for a skill its test rows, otherwise none."""
    epochs: int = Field(1, ge=1)
    """How often the rows are trained on, each time in another order."""
    steps: int | None = Field(None, ge=1)
    """How many steps it has, instead of ``epochs``: rows begin anew, or are not all trained on."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak of this stage's schedule; default ``train.learning_rate``."""
    lr_scheduler_type: str | None = None
    """Schedule over this stage; default ``train.lr_scheduler_type``."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps of linear warm-up at the stage's start; default ``train.warmup_steps``, a share of the stage if below 1."""
    moments: Moments = Moments.RESET
    """Whether the optimizer's moments start anew with this stage. The first stage has none to carry."""

    @model_validator(mode="after")
    def _shares_of_all(self) -> Stage:
        check_shares(self.sources)
        if self.steps is not None and self.epochs != 1:
            raise UserError(f"steps: {self.steps} and epochs: {self.epochs} both say how long the stage is; give one")
        return self

    @property
    def sources(self) -> tuple[TrainingData, ...]:
        """Where its rows come from."""
        return sources_of(self.data)

    @property
    def skill(self) -> str | None:
        """The built-in skill that it trains; None for other rows."""
        names = {one.skill for one in self.sources}
        return names.pop() if len(names) == 1 else None


class EvaluationSection(BaseModel):
    """How tasks are evaluated: before the first stage, after every one, and within them where `every` says so."""

    model_config = _FROZEN

    skills: tuple[str, ...] = ()
    """Skills to evaluate besides those of the stages."""
    tasks: dict[str, EvaluationData] = {}
    """Held-out rows of anything else to evaluate, by the names that scores have: what the model can before training,
    and no stage trains. ``{chat: {path: chat.jsonl, metric: loss}}``."""
    every: int | None = Field(None, ge=1)
    """Steps of the run from one evaluation to the next, besides those at the ends of stages."""
    rows: int = Field(64, ge=1)
    """Test rows of every skill."""
    batch_size: int = Field(32, ge=1)
    """Rows per generated batch. Batches are formed before they are dealt to ranks, so scores do not depend on these."""
    max_new_tokens: int = Field(48, ge=1)
    """Longest answer that is generated."""
    weights: Literal["auto", "gathered", "partitioned"] = "auto"
    """Gather all weights once per evaluation (fast, needs room for the whole model on every rank), keep them
    partitioned (every token is generated in step on all ranks), or decide by the free memory."""
    lm_eval: HarnessSection | None = None
    """General ability: tasks of lm-evaluation-harness, ``{tasks: [arc_easy, hellaswag]}``, scored with all others.
    Wants the extra ``eval``."""

    @field_validator("skills")
    @classmethod
    def _known_skills(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(get_skill(name).name for name in names)

    @field_validator("tasks")
    @classmethod
    def _names_of_scores(cls, tasks: dict[str, EvaluationData]) -> dict[str, EvaluationData]:
        for name in tasks:
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
                raise UserError(f"task {name!r} is to be named by letters, digits and _.- alone; give it such a name")
        return tasks


class MethodSection(BaseModel):
    """What keeps the model from forgetting."""

    model_config = _FROZEN

    preset: Preset | None = None
    """Settings of ``keep`` and ``epi`` to begin from, of which every key can be given otherwise
    ([what they are](recipes.md#presets)): ``paper``, ``balanced``, ``strong`` or ``data_free``."""
    epi: EPIConfig = EPIConfig()
    keep: Keep | None = None
    """What must not be forgotten, and how it is kept."""
    probe: DataSource | None = None
    """Rows over which ``policy: static`` with ``probe_steps`` measures importance; default the first rows of the run.
    ``keep`` does it for every policy, and more."""

    @model_validator(mode="before")
    @classmethod
    def _remember_what_is_kept(cls, values: Any) -> Any:
        """A preset lies below what is given. Where importance is kept, memory and what it protects begin otherwise."""
        if not isinstance(values, Mapping):
            return values
        values = with_preset(values)
        keep, epi = values.get("keep"), values.get("epi", {})
        # What is no mapping is told by the validation.
        wants = isinstance(keep, Mapping) and keep.get("importance", True) is True
        if not wants or not isinstance(epi, Mapping) or epi.get("memory") == Memory.NONE:
            return values
        return {**values, "epi": {"memory": Memory.STAGE_MAX, "protects": Protects.PAST, **epi}}

    @model_validator(mode="after")
    def _importance_is_remembered(self) -> MethodSection:
        remembers, keeps = self.epi.memory is not Memory.NONE, self.keep is not None and self.keep.importance
        if keeps and not remembers:
            raise UserError(
                "keep.importance is remembered as memory says, which is none; set method.epi.memory: stage_max or "
                "per_task, or keep.importance: false"
            )
        if remembers and not keeps and self.epi.policy is not PolicyName.EVOLVING:
            raise UserError(
                f"memory has nothing to remember: policy: {self.epi.policy.value} measures nothing while it trains, "
                "and nothing is kept; set method.keep, or remove memory"
            )
        return self

    @model_validator(mode="after")
    def _probe_is_used(self) -> MethodSection:
        if self.probe is not None and self.epi.probe_steps is None:
            raise UserError(
                "probe is read by policy: static with probe_steps only; set method.epi.probe_steps or remove it"
            )
        if self.keep is not None and self.epi.probe_steps is not None:
            raise UserError(
                "probe_steps measures importance before the first step, and so does keep; give what probe has as "
                "keep.data and keep.windows instead of probe_steps, or remove keep"
            )
        return self


class Recipe(BaseModel):
    """A whole run."""

    model_config = _FROZEN

    model: ModelSection
    stages: tuple[Stage, ...]
    method: MethodSection = MethodSection()
    train: dict[str, Any] = {}
    """Arguments of TRL's ``SFTConfig`` (Hugging Face ``TrainingArguments``) by their own names. ``deepspeed`` may name
    a shipped configuration, or hold it as ``preset`` with changes: ``{preset: zero3_hpz, gradient_clipping: 0.5}``."""
    evaluation: EvaluationSection = EvaluationSection()
    output: str
    """Folder of the run."""
    ranks: int | None = Field(None, ge=1)
    """Ranks to start on this machine; default one per GPU, or 1 without any. Inside a launcher its ranks are used."""

    @model_validator(mode="after")
    def _distinct_stages(self) -> Recipe:
        if not self.stages:
            raise UserError("stages must hold at least one stage")
        names = [stage.name for stage in self.stages]
        repeated = {name for name in names if names.count(name) > 1}
        if repeated:
            raise UserError(f"stage names must differ, repeated: {', '.join(sorted(repeated))}")
        return self

    @model_validator(mode="after")
    def _distinct_scores(self) -> Recipe:
        for kind, names in (("stage", [stage.name for stage in self.stages]), ("skill", self.evaluation.skills)):
            if both := sorted(set(names) & self.evaluation.tasks.keys()):
                raise UserError(
                    f"evaluation.tasks.{both[0]} has the name of a {kind} that is scored, too; give it another name"
                )
        return self

    @model_validator(mode="after")
    def _there_is_a_past_to_protect(self) -> Recipe:
        keep = self.method.keep
        if keep is not None and keep.importance:
            return self
        if self.method.epi.protects is Protects.PAST and len(self.stages) < 2:
            raise UserError(
                "method.epi.protects: past isolates nothing before a stage has finished, and there is one stage only; "
                "add a stage, set method.keep, or set protects: past_and_present"
            )
        return self

    @model_validator(mode="after")
    def _replay_has_stages_and_a_loss(self) -> Recipe:
        keep = self.method.keep
        if keep is None or not keep.replay:
            return self
        if keep.replay_stages and len(self.stages) < 2:
            raise UserError(
                "method.keep.replay_stages: true draws rows of stages that have finished, and there is one stage only; "
                "remove it, or add a stage"
            )
        if keep.replay_loss is ReplayLoss.TOKEN:
            return self
        for name, plain in (("label_smoothing_factor", 0), ("average_tokens_across_devices", True)):
            if self.train.get(name, plain) != plain:
                raise UserError(
                    f"train.{name}: {self.train[name]} averages the losses of tokens in another way, in which replayed "
                    "rows cannot have their share; remove it, or set method.keep.replay_loss: token"
                )
        return self

    @model_validator(mode="after")
    def _base_is_what_is_kept(self) -> Recipe:
        if self.method.keep is not None and any(stage.name == BASE for stage in self.stages):
            raise UserError(
                f"a stage is called {BASE}, which is what method.keep remembers the importance of the kept rows as; "
                "give the stage another name"
            )
        return self

    @model_validator(mode="after")
    def _moments_are_kept_for_adam(self) -> Recipe:
        reset = [stage.name for stage in self.stages[1:] if stage.moments is Moments.RESET]
        if self.method.epi.state is StateFormat.ADAM and reset:
            raise UserError(
                f"under state: adam the optimizer's moments are the importance, which stage {reset[0]} would forget; "
                "set moments: carry there, or another state"
            )
        return self
