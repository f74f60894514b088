"""What must not be forgotten: rows that are given, rows that the model writes itself, and what they are for."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from epi_ds.errors import UserError
from epi_ds.recipe.sources import OneOrSeveral, TrainingData, check_shares, sources_of

BASE = "base"
"""The stage name under which the importance of what is kept is remembered: what the model could before the run."""

_FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Written(StrEnum):
    """What a model writes where it is asked for rows of its own."""

    AUTO = "auto"
    CONVERSATIONS = "conversations"
    TEXTS = "texts"


class ReplayLoss(StrEnum):
    """How the loss of a step that replays rows is averaged."""

    SHARE = "share"
    TOKEN = "token"


class OwnRows(BaseModel):
    """Rows that the model itself writes before training."""

    model_config = _FROZEN

    rows: int = Field(ge=1)
    """How many."""
    kind: Written = Written.AUTO
    """``conversations``: the chat template begins a user's turn, which the model writes, and then its answer; ``texts``
    begin at the beginning-of-text token. ``auto``: conversations where the model's tokenizer has a template itself."""
    temperature: float = Field(1.0, gt=0)
    """Of the sampling; 1 is what the model itself believes."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample among the likeliest tokens that hold so much of the probability; 1 among all."""
    max_prompt_tokens: int = Field(128, ge=1)
    """Longest turn of a user; longer ones are cut, and so left out."""
    max_new_tokens: int = Field(512, ge=1)
    """Longest answer or text; longer ones are cut, and so left out."""
    batch_size: int = Field(32, ge=1)
    """Rows that are written together. Which rows they are depends on it, and not on the number of ranks."""
    seed: int = Field(0, ge=0, lt=1 << 32)
    """Where the sampling begins; runs of other seeds keep the same rows."""
    attempts: int = Field(4, ge=1)
    """Rows to begin at most, for each of ``rows``: repeated, empty and cut ones are left out and counted."""
    file: str | None = None
    """Where the rows are written, as JSON lines, for several runs to share; default ``own_rows.jsonl`` in the run
    folder. Rows that stand there are used as they are."""

    @field_validator("file")
    @classmethod
    def _is_json_lines(cls, file: str | None) -> str | None:
        if file is not None and not file.endswith(".jsonl"):
            raise UserError(f"own rows are written as JSON lines, so the name ends with .jsonl; got {file!r}")
        return file


def _or_a_number(schema: dict[str, Any]) -> None:
    """Add to the schema of ``self`` what its validator takes, too."""
    schema["anyOf"].insert(0, {"type": "integer", "minimum": 1})


class Keep(BaseModel):
    """What must not be forgotten, and how it is kept."""

    model_config = _FROZEN

    data: OneOrSeveral | None = None
    """Rows that are given: of what the model can, and shall still be able to do."""
    self: OwnRows | None = Field(None, json_schema_extra=_or_a_number)
    """Rows that the model writes itself before training: how many, or a mapping."""
    importance: bool = True
    """Before the first step the rows' gradients are measured, and remembered as those of a finished stage called
    ``base``, which every later mask protects. ``method.epi.memory`` is then ``stage_max`` and ``protects`` is ``past``
    where they are not given."""
    windows: int | None = Field(None, ge=1)
    """Global batches that are measured; default as many as the rows fill, at most 64."""
    replay: float = Field(0.0, ge=0, lt=1)
    """Share of every global batch that is drawn from the rows, exact over time: batches of 8 with 0.05 have one such
    row in two of five steps. Every row of a stage is trained as often as without, so that a stage has more steps."""
    replay_stages: bool = False
    """Whether rows of finished stages are drawn, too: what is kept and each of these stages have equal parts."""
    replay_loss: ReplayLoss = ReplayLoss.SHARE
    """``share``: the mean over the tokens of new rows and the mean over those of replayed ones, each by its share of
    the global batch's rows, so that long rows do not drown short answers; ``token``: the mean over all tokens."""
    evaluation: bool = True
    """Whether held-out rows are scored before training and at the end of every stage: test rows of a skill, else one
    row in ten, at most ``evaluation.rows`` of a source, by their loss. They are neither measured nor replayed."""

    @field_validator("self", mode="before")
    @classmethod
    def _number_of_rows(cls, value: Any) -> Any:
        if isinstance(value, (OwnRows, Mapping)) or value is None:
            return value
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(
                f"must be a number of rows, or a mapping such as {{rows: 512, temperature: 0.8}}; got {value!r}"
            )
        return {"rows": value}

    @model_validator(mode="after")
    def _has_rows_and_an_end(self) -> Keep:
        if self.data is None and self.self is None:
            raise UserError("there is nothing to keep; give data (rows), self (how many the model writes), or both")
        if self.data is not None:
            check_shares(self.sources)
        if self.self is not None and any(one.share is not None for one in self.sources):
            raise UserError("share says how sources are mixed, and rows of self have none; remove share, or self")
        if not self.importance and not self.replay and not self.evaluation:
            raise UserError(
                "importance and evaluation are false and replay is 0, so nothing would be done with what is kept; set "
                "one of them, or remove keep"
            )
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Keep:
        given = self.model_fields_set
        if not self.importance and self.windows is not None:
            raise UserError("windows says how much importance is measured on, and importance is false; remove it")
        ignored = [name for name in ("replay_stages", "replay_loss") if name in given]
        if not self.replay and ignored:
            raise UserError(f"{ignored[0]} says how rows are replayed, and replay is 0; set replay, or remove it")
        return self

    @property
    def sources(self) -> tuple[TrainingData, ...]:
        """The sources of ``data``; rows of ``self`` are not among them."""
        return sources_of(self.data)
