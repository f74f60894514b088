"""Where rows of a recipe come from: one source, several of a stage or of what is kept, held-out ones."""

from __future__ import annotations

from enum import Enum, StrEnum, auto
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from epi_ds.data.formats import Columns, Format
from epi_ds.data.skills import get_skill
from epi_ds.data.sources import SkillRows, check_split, find_files, is_local
from epi_ds.data.table import Table, files_matching
from epi_ds.errors import UserError

_FROZEN = ConfigDict(frozen=True, extra="forbid")


class Metric(StrEnum):
    """How an answer is scored."""

    EXACT_MATCH = "exact_match"
    FINAL_NUMBER = "final_number"
    LOSS = "loss"


class Files(Enum):
    """Whether validation looks for the files that a recipe names: the context of pydantic's ``model_validate``."""

    MUST_BE_THERE = auto()
    ARE_NOT_LOOKED_FOR = auto()


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
    """Column of conversations, ``[{role, content}, ...]`` or ``[{from, value}, ...]``, which lose turns behind the last
    answer."""
    prompt: str | tuple[str, ...] | None = None
    """Column of prompts; several are joined by a blank line, empty ones left out."""
    completion: str | None = None
    """Column of the answers to ``prompt``."""

    @field_validator("skill")
    @classmethod
    def _known_skill(cls, name: str | None) -> str | None:
        return None if name is None else get_skill(name).name

    @model_validator(mode="after")
    def _one_source(self, info: ValidationInfo) -> DataSource:
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
            if info.context is not Files.ARE_NOT_LOOKED_FOR:
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


OneOrSeveral = Annotated[
    Annotated[TrainingData, Tag("<one>")] | Annotated[tuple[TrainingData, ...], Tag("<several>")],
    # A union by trial would tell every mistake twice.
    Discriminator(lambda value: "<several>" if isinstance(value, (list, tuple)) else "<one>"),
]
"""One source, or several of them."""


def sources_of(data: TrainingData | tuple[TrainingData, ...] | None) -> tuple[TrainingData, ...]:
    """Return the sources that ``data`` holds; none for None."""
    if data is None:
        return ()
    return data if isinstance(data, tuple) else (data,)


def check_shares(sources: tuple[TrainingData, ...]) -> None:
    """Raise UserError where there is no source, or where some of several have a share and others have none."""
    given = [one.share is not None for one in sources]
    if not given:
        raise UserError("data must hold at least one source")
    if any(given) and (len(given) == 1 or not all(given)):
        raise UserError("share is of several sources: give all of them one, or none")
