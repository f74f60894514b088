"""The recipe: what is trained, on what, in which stages. Frozen values; loading.py reads them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from epi_ds.choices import Protects, StateFormat
from epi_ds.config import EPIConfig
from epi_ds.data.formats import Columns, Format
from epi_ds.data.skills import SKILLS
from epi_ds.data.sources import SkillRows, check_split, find_files, is_local
from epi_ds.data.table import Table, files_matching
from epi_ds.errors import UserError, nearest
from epi_ds.recipe.lora import LoraSection

_FROZEN = ConfigDict(frozen=True, extra="forbid")


class Moments(StrEnum):
    """What happens to the optimizer's moments when a stage begins."""

    RESET = "reset"
    CARRY = "carry"


class Metric(StrEnum):
    """How an answer is scored."""

    EXACT_MATCH = "exact_match"
    FINAL_NUMBER = "final_number"
    LOSS = "loss"


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


class DataSource(BaseModel):
    """Rows of a built-in skill, of files (JSON, CSV, Parquet, Arrow, as they are or compressed), or of the hub."""

    model_config = _FROZEN

    skill: str | None = None
    """Name of a built-in skill."""
    path: str | None = None
    """A file, whose content decides how it is read, or a hub id. What exists as a file is never taken for an id, and
    no character of a path stands for others."""
    glob: str | None = None
    """Files by a pattern, as one table in the order of their names: ``shards/*.jsonl``, ``data/**/*.parquet``."""
    split: str = "train"
    """``train`` or ``test`` of a skill; else a split in the notation of ``datasets``, such as ``train[-200:]``. A file
    is one split called ``train``."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    rows: int | None = Field(None, ge=1)
    """Take the first rows only; for a skill, how many to generate (required)."""
    format: Format | None = None
    """What rows look like, where that is not to be found by their shape, or can be read in two ways."""
    where: dict[str, Any] = {}
    """Rows to take: the value, or a list of values, that a column must have, such as ``{label: true}``."""
    messages: str | None = None
    """Column of conversations, ``[{role, content}, ...]`` or ``[{from, value}, ...]``, that end with the assistant."""
    prompt: str | tuple[str, ...] | None = None
    """Column of prompts; several are joined by a blank line, empty ones left out."""
    completion: str | None = None
    """Column of the answers to ``prompt``."""

    @field_validator("skill")
    @classmethod
    def _known_skill(cls, name: str | None) -> str | None:
        if name is not None and name not in SKILLS:
            raise UserError(f"there is no skill {name!r}{nearest(name, SKILLS)}; there are {', '.join(SKILLS)}")
        return name

    @model_validator(mode="after")
    def _one_source(self) -> DataSource:
        if [self.skill, self.path, self.glob].count(None) != 2:
            raise UserError("give one of skill, path and glob")
        if self.skill is not None:
            if self.rows is None:
                raise UserError(f"skill {self.skill} is generated, so rows must say how many")
            if self.split not in ("train", "test"):
                raise UserError(f"split of a skill must be train or test, got {self.split!r}")
            ignored = [
                name
                for name in ("messages", "prompt", "completion", "subset", "format", "where")
                if getattr(self, name)
            ]
            if ignored:
                raise UserError(
                    f"skill {self.skill} has conversations, so {', '.join(ignored)} would be ignored; remove it"
                )
        elif (self.prompt is None) != (self.completion is None):
            raise UserError("prompt and completion name two columns of one file: give both or neither")
        elif self.messages is not None and self.prompt is not None:
            raise UserError("give messages, or prompt and completion, not both")
        elif self.format is not None and (self.messages is not None or self.prompt is not None):
            raise UserError("format says how columns are called, so it goes without messages, prompt and completion")
        elif self.path is None or is_local(self.path):
            if self.subset is not None:
                raise UserError(f"subset {self.subset!r} is of a data set of the hub, and these are files; remove it")
            self._files()
        return self

    def _files(self) -> tuple[Path, ...]:
        if self.glob is None:
            return find_files(self.path or "", subset=self.subset, split=self.split)
        check_split(self.split, self.glob)
        return files_matching(self.glob)

    def resolve(self, *, seed: int) -> Table | SkillRows:
        """Return what to read. Downloads what the hub has and this machine lacks; raises what `find_files` raises."""
        if self.skill is not None:
            return SkillRows(self.skill, self.split, self.rows or 0, seed)
        prompt = (self.prompt,) if isinstance(self.prompt, str) else self.prompt or ()
        return Table(
            name=self.glob or self.path or "",
            files=self._files(),
            columns=Columns(self.messages, prompt, self.completion),
            format=self.format,
            split=self.split,
            where=self.where,
            limit=self.rows,
        )


class TrainingData(DataSource):
    """One of the sources of a stage."""

    source: str | None = Field(None, pattern=r"^[A-Za-z0-9_.-]+$")
    """What messages call it; default its skill, file or pattern."""
    share: float | None = Field(None, gt=0)
    """How much of the stage's rows are its own, in proportion to the other sources'; give all of them one, or none.
    Every global batch then has its share, and a source that is exhausted begins anew in another order. Without, the
    rows of all sources are one table."""

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.source or self.skill or self.glob or self.path or ""


class EvaluationData(DataSource):
    """Held-out rows and how answers to them are scored."""

    metric: Metric = Metric.EXACT_MATCH
    """``exact_match`` of the whole answer, ``final_number`` for worked solutions, or teacher-forced ``loss``.
    Skills bring their own check."""


class Stage(BaseModel):
    """One stretch of the run with data of its own."""

    model_config = _FROZEN

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """What the report, ``--until`` and overrides call it."""
    data: Annotated[
        Annotated[TrainingData, Tag("<one>")] | Annotated[tuple[TrainingData, ...], Tag("<several>")],
        # A union by trial would tell every mistake twice.
        Discriminator(lambda value: "<several>" if isinstance(value, (list, tuple)) else "<one>"),
    ]
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
        given = [one.share is not None for one in self.sources]
        if not given:
            raise UserError("data must hold at least one source")
        if any(given) and (len(given) == 1 or not all(given)):
            raise UserError("share is of several sources: give all of them one, or none")
        if self.steps is not None and self.epochs != 1:
            raise UserError(f"steps: {self.steps} and epochs: {self.epochs} both say how long the stage is; give one")
        return self

    @property
    def sources(self) -> tuple[TrainingData, ...]:
        """Where its rows come from."""
        return self.data if isinstance(self.data, tuple) else (self.data,)

    @property
    def skill(self) -> str | None:
        """The built-in skill that it trains; None for other rows."""
        names = {one.skill for one in self.sources}
        return names.pop() if len(names) == 1 else None


class EvaluationSection(BaseModel):
    """How tasks are evaluated, before the first stage and after every one."""

    model_config = _FROZEN

    skills: tuple[str, ...] = ()
    """Skills to evaluate besides those of the stages."""
    rows: int = Field(64, ge=1)
    """Test rows of every skill."""
    batch_size: int = Field(32, ge=1)
    """Rows per generated batch. Batches are formed before they are dealt to ranks, so scores do not depend on these."""
    max_new_tokens: int = Field(48, ge=1)
    """Longest answer that is generated."""
    weights: Literal["auto", "gathered", "partitioned"] = "auto"
    """Gather all weights once per evaluation (fast, needs room for the whole model on every rank), keep them
    partitioned (every token is generated in step on all ranks), or decide by the free memory."""

    @field_validator("skills")
    @classmethod
    def _known_skills(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in SKILLS:
                raise UserError(f"there is no skill {name!r}{nearest(name, SKILLS)}; there are {', '.join(SKILLS)}")
        return names


class MethodSection(BaseModel):
    """What keeps the model from forgetting."""

    model_config = _FROZEN

    epi: EPIConfig = EPIConfig()
    probe: DataSource | None = None
    """Rows over which ``policy: static`` with ``probe_steps`` measures importance, for example of what the model must
    not forget; default the first rows of the run."""

    @model_validator(mode="after")
    def _probe_is_used(self) -> MethodSection:
        if self.probe is not None and self.epi.probe_steps is None:
            raise UserError(
                "probe is read by policy: static with probe_steps only; set method.epi.probe_steps or remove it"
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
    def _there_is_a_past_to_protect(self) -> Recipe:
        if self.method.epi.protects is Protects.PAST and len(self.stages) < 2:
            raise UserError(
                "method.epi.protects: past isolates nothing before a stage has finished, and there is one stage only; "
                "add a stage, or set protects: past_and_present"
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
