"""What a line of results has beside its scores: measures that say why an arm keeps what it keeps. Frozen values."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

_FROZEN = ConfigDict(frozen=True, extra="forbid")


class Flips(BaseModel):
    """What became of the answers to a task's test rows, as shares of all of them.

    ``right_to_wrong`` less ``wrong_to_right`` is how far the score fell.
    """

    model_config = _FROZEN

    right_to_wrong: float = Field(ge=0, le=1)
    wrong_to_right: float = Field(ge=0, le=1)


class MaskDrift(BaseModel):
    """Overlaps of masks, as intersection over union, and what was isolated at the end."""

    model_config = _FROZEN

    refreshes: int = Field(ge=1)
    """That isolated anything."""
    isolated_share: float = Field(ge=0, le=1)
    """Of the covered entries, by the last mask."""
    first_last: float | None = Field(ge=0, le=1)
    """Overlap of the first and the last mask, from one entry in 16; of one mask there is none."""
    between_refreshes: float | None = Field(ge=0, le=1)
    """Mean overlap of a mask and the one before."""
    layer_flip_rate: dict[str, float]
    """By layer, the mean share of what was isolated that the next refresh released."""


class Cosines(BaseModel):
    """Cosine of the new task's mean gradient and that of a kept skill, at both ends of a run.

    The paper's task gradient conflict is ``max(0, -cosine)``: below 0, a step that learns the one unlearns the other.
    """

    model_config = _FROZEN

    base: float = Field(ge=-1, le=1)
    """At the weights before training."""
    trained: float = Field(ge=-1, le=1)
    """At the weights of the run's end."""


class Sensitivity(BaseModel):
    """How well a run knew what a skill of its base is sensitive to."""

    model_config = _FROZEN

    rank_correlation: float | None = Field(ge=-1, le=1)
    """Spearman's, over all covered entries, of the online importance at the run's end and the base's mean squared
    gradient; None where either is the same everywhere."""
    held: float | None = Field(ge=0, le=1)
    """Share of the skill's most sensitive entries that the last mask isolates, of as many as it isolates: by chance
    the isolated share. None where it isolates nothing."""
