"""The ``epi`` section of a DeepSpeed configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from epi_ds.anchor_config import AnchorConfig
from epi_ds.checkpoint_config import CheckpointConfig
from epi_ds.choices import (
    ADAPTIVE,
    AnchorWeight,
    Apply,
    Curve,
    Memory,
    MissingState,
    Normalizer,
    PolicyName,
    Protects,
    Pull,
    Redraw,
    Selection,
    StateFormat,
    Transport,
)
from epi_ds.errors import UserError, problems_of, summarize
from epi_ds.policy_rules import adaptive_problem, decided_by, memory_problem, policy_problems, with_policy_defaults

# Top-level key of a DeepSpeed configuration that holds these settings.
SECTION = "epi"


class RatioSchedule(BaseModel):
    """A ratio that changes along the run."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schedule: Curve
    """``linear``, or the half wave of a ``cosine``, which begins and ends level."""

    start: float = Field(ge=0, lt=1)
    """Ratio until ``warmup_steps``."""

    end: float = Field(ge=0, lt=1)
    """Ratio from ``steps`` later on."""

    steps: int = Field(ge=1)
    """Applied steps from the one to the other."""


class EPIConfig(BaseModel):
    """Settings of evolving parameter isolation (arXiv 2604.14010). Frozen; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    policy: PolicyName = PolicyName.EVOLVING
    """``evolving`` selects a new mask every ``refresh_interval`` steps; ``static`` isolates one mask for the
    whole run; ``none`` isolates nothing and measures nothing. Controls and other methods
    ([policies](method.md#policies)): ``random``, ``inverted`` (the least important entries), ``first`` (the first mask
    is kept), ``momentum`` (MoFO: only the largest momenta move), ``half`` (HFT: half of the matrices stand still)."""

    redraw: Redraw = Redraw.NEVER
    """``policy: random`` only: one mask for the whole run, another one for every ``stage``, or at every ``refresh``."""

    ratio: float | RatioSchedule | Literal["adaptive"] = 0.01
    """Requested share of the covered parameters to isolate (the paper's p), in [0, 1); a schedule of it; or
    ``adaptive``: as many as hold ``coverage`` of the importance. ``policy: momentum`` wants one, of every tensor; under
    ``half`` it is 0.5."""

    coverage: float = Field(0.5, gt=0, lt=1)
    """``ratio: adaptive`` only: share of the importance, as selection compares it, that isolated entries shall hold."""

    max_ratio: float = Field(0.2, gt=0, lt=1)
    """``ratio: adaptive`` only: most that it isolates."""

    refresh_interval: int | Literal["adaptive"] = 500
    """Applied optimizer steps from one refresh to the next (the paper's H); or ``adaptive``: a mask is looked at every
    ``check_interval`` steps, and refreshed once it has drifted. 1 under ``policy: momentum``."""

    check_interval: int = Field(50, ge=1)
    """``refresh_interval: adaptive`` only: applied steps from one look at the mask to the next."""

    max_drift: float = Field(0.1, ge=0, le=1)
    """``refresh_interval: adaptive`` only: share of the isolated entries that may lie below the threshold of now; above
    it, the mask is refreshed."""

    warmup_steps: int = Field(0, ge=0)
    """Applied steps before which no mask is selected; importance is measured from the first step on."""

    hysteresis: float = 1.0
    """Against masks that change for nothing: selection divides the importance of entries isolated now by this power of
    two in (0, 1], so that one of them leaves only when others exceed it by that factor. 1 is off."""

    ema_decay: float = Field(0.99, ge=0, lt=1)
    """Weight of the old importance in ``S <- ema_decay * S + (1 - ema_decay) * g * g`` (the paper's beta)."""

    selection: Selection = Selection.NORMALIZED_GLOBAL
    """``normalized_global`` (the paper's): one quantile over the normalised importance of all layers;
    ``per_layer``: the quantile of each layer; ``raw_global``: one quantile without normalisation, and what
    ``policy: random`` begins from."""

    normalizer: Normalizer = Normalizer.MINMAX
    """``normalized_global`` only: ``minmax`` (the paper's) or ``mean``, which no single outlier decides."""

    layer: Literal["block", "tensor"] | dict[str, str] = "block"
    """What a layer is: the outermost numbered block of a parameter's name, a tensor, or named groups given as
    regular expressions over parameter names, of which every covered parameter must match exactly one. ``tensor`` under
    ``policy: momentum``."""

    include: tuple[str, ...] = ()
    """Regular expressions over parameter names; empty covers every trainable parameter."""

    exclude: tuple[str, ...] = ()
    """Regular expressions over parameter names that are never isolated, taken from what ``include`` covers."""

    apply: Apply = Apply.REDUCTION
    """``reduction``: isolated entries count as zero gradient for norm, clipping and optimizer (Adam family only);
    ``update`` (the paper's eq. 12-13): the optimizer sees every gradient and only the update is undone, as always under
    ``policy: momentum``."""

    state: StateFormat = StateFormat.U16
    """Storage of the importance: ``fp32``, ``bf16`` and ``u16`` (2 bytes, the latter with one more bit of precision),
    ``u8`` (1.016 bytes), or ``adam``, which keeps none and reads the optimizer's second moments instead."""

    memory: Memory = Memory.NONE
    """``stage_max``: when a stage ends, its importance is kept as an element-wise maximum over the finished stages, in
    the format of ``state``, so that later masks protect what earlier tasks needed. An average alone has forgotten a
    finished task within a few hundred steps. ``per_task``: every finished stage's importance is kept by itself, and the
    tasks share the budget: the mask holds about equally many entries for each, and those that several need but once.
    ``engine.epi.remember(name, losses)``, and ``method.keep`` of a recipe, remember what is no stage of the run, under
    every policy; under ``static`` the mask is selected from it."""

    protects: Protects = Protects.PAST_AND_PRESENT
    """With ``memory``: protect what finished stages needed and the present one needs, or the finished ones alone
    (``past``), so that nothing is isolated in the first stage. Where a recipe has ``method.keep``, the default is
    ``past``."""

    anchor: AnchorConfig | None = None
    """A pull of all covered entries towards the weights that knew what must be kept; under any policy, ``none`` too."""

    seed: int = Field(0, ge=0)
    """Where the stochastic rounding of ``bf16``, ``u16`` and ``u8`` begins, and what ``random`` and ``half``
    draw from."""

    exchange: Transport = Transport.AUTO
    """Transport of the sketches: ``all_gather``, ``all_reduce``, ``per_layer`` also ``reduce_scatter``, where every
    rank sums and answers for some layers; ``auto`` picks the quickest by the model that `epi-ds estimate` prints."""

    allow_inactive: bool = False
    """Accept a planned run too short for a mask ever to become active."""

    mask_from: str | None = None
    """``static`` only: a checkpoint whose mask is loaded: a tag folder, or a trainer's with a tag in it."""

    probe_steps: int | None = Field(None, ge=1)
    """``static`` only: batches over which squared gradients are averaged before the first step."""

    missing_state: MissingState = MissingState.ERROR
    """Loading a checkpoint without isolation state is an error, or starts with empty importance (``fresh``, which wants
    ``checkpoint.trust`` too: nothing vouches for such a checkpoint). The same of one that DeepSpeed loaded before
    `attach`."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """How the run's checkpoints are kept and read."""

    max_skipped_steps: int = Field(50, ge=1)
    """Steps skipped in a row, because their gradients were not finite, after which the run stops with a diagnosis. Loss
    scaling in fp16 may skip some 20 at the start."""

    @property
    def selection_interval(self) -> int:
        """Applied steps from one step after which a mask may be selected to the next."""
        return self.check_interval if isinstance(self.refresh_interval, str) else self.refresh_interval

    @property
    def has_room_for_answers(self) -> bool:
        """Whether a refresh stays within 8 collectives where every round of its search takes two."""
        return self.memory is Memory.NONE or (self.memory is Memory.STAGE_MAX and self.protects is Protects.PAST)

    @model_validator(mode="before")
    @classmethod
    def _begin_from_policy(cls, values: Any) -> Any:
        return with_policy_defaults(values) if isinstance(values, Mapping) else values

    def as_section(self) -> dict[str, Any]:
        """Return the settings that `parse_config` reads back as these, as JSON has them; defaults are left out."""
        whole = self.model_dump(mode="json")
        return {**self.model_dump(mode="json", exclude_defaults=True), **{k: whole[k] for k in decided_by(self.policy)}}

    @field_validator("refresh_interval", mode="before")
    @classmethod
    def _check_interval(cls, value: Any) -> Any:
        if value == ADAPTIVE or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise UserError(f"must be a whole number of steps greater than or equal to 1, or adaptive; got {value!r}")

    @field_validator("ratio", mode="before")
    @classmethod
    def _check_ratio(cls, value: Any) -> Any:
        if isinstance(value, RatioSchedule) or value == ADAPTIVE:
            return value
        if isinstance(value, Mapping):
            try:
                return RatioSchedule.model_validate(value)
            except ValidationError as error:
                raise UserError("; ".join(problems_of(error, RatioSchedule))) from None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise UserError(
                f"must be a number in [0, 1), adaptive, or a schedule such as "
                f"{{schedule: linear, start: 0.2, end: 0.05, steps: 1000}}, got {value!r}"
            )
        return float(value)

    @field_validator("hysteresis")
    @classmethod
    def _is_power_of_two(cls, value: float) -> float:
        if not 2.0**-20 <= value <= 1 or math.frexp(value)[0] != 0.5:
            raise UserError(
                f"must be a power of two in (0, 1], at least 2^-20, so that dividing by it is exact; got {value}"
            )
        return value

    @field_validator("normalizer", mode="before")
    @classmethod
    def _refuse_rank(cls, value: Any) -> Any:
        if value == "rank":
            raise UserError("rank normalisation is the same thing as selection: per_layer; set that instead")
        return value

    @model_validator(mode="after")
    def _check_normalizer(self) -> EPIConfig:
        if "normalizer" in self.model_fields_set and self.selection is not Selection.NORMALIZED_GLOBAL:
            raise UserError(
                f"normalizer belongs to selection: normalized_global, and would be ignored by {self.selection.value}; "
                "remove it"
            )
        return self

    @model_validator(mode="after")
    def _check_adam(self) -> EPIConfig:
        if self.state is not StateFormat.ADAM:
            return self
        if self.apply is not Apply.UPDATE:
            raise UserError(
                "state: adam reads the second moments, which apply: reduction rebuilds from importance; set apply: "
                "update, or another state"
            )
        if "ema_decay" in self.model_fields_set:
            raise UserError(
                "ema_decay would be ignored by state: adam, whose importance decays by the optimizer's beta2; "
                "remove it, or set another state"
            )
        if self.memory is not Memory.NONE:
            raise UserError(
                "memory keeps copies of importance in the format of state, and state: adam has none; set state: u8"
            )
        if self.probe_steps is not None:
            raise UserError(
                "probe_steps measures importance before the first step, when state: adam has none; set another state"
            )
        return self

    @model_validator(mode="after")
    def _check_adaptive(self) -> EPIConfig:
        for name, fields in (
            ("ratio", ("coverage", "max_ratio")),
            ("refresh_interval", ("check_interval", "max_drift")),
        ):
            adaptive = getattr(self, name) == ADAPTIVE
            ignored = [field for field in fields if field in self.model_fields_set]
            if ignored and not adaptive:
                raise UserError(f"{ignored[0]} belongs to {name}: adaptive, and would be ignored without it; remove it")
            if (problem := adaptive_problem(self, name)) is not None:
                raise UserError(problem)
        return self

    @model_validator(mode="after")
    def _check_memory(self) -> EPIConfig:
        if self.memory is Memory.NONE and "protects" in self.model_fields_set:
            raise UserError("protects belongs to memory, and would be ignored without it; remove it, or set memory")
        if (problem := memory_problem(self)) is not None:
            raise UserError(problem)
        return self

    @model_validator(mode="after")
    def _check_anchor(self) -> EPIConfig:
        if self.anchor is None:
            return self
        if self.anchor.weight is AnchorWeight.IMPORTANCE and self.memory is Memory.NONE:
            raise UserError(
                "anchor.weight: importance pulls by what is remembered of finished stages, and memory: none remembers "
                "nothing; set memory: stage_max, or anchor.weight: uniform"
            )
        if self.anchor.pull is Pull.GRADIENT and self.state is StateFormat.ADAM:
            raise UserError(
                "anchor.pull: gradient would enter the second moments, which are the importance under state: adam; set "
                "another state, or anchor.pull: update"
            )
        return self

    @model_validator(mode="after")
    def _check_exchange(self) -> EPIConfig:
        if self.exchange is Transport.REDUCE_SCATTER and self.selection is not Selection.PER_LAYER:
            raise UserError(
                f"exchange: reduce_scatter deals layers to ranks, but selection: {self.selection.value} exchanges one "
                "small vector for all layers, so there is nothing to scatter; set exchange: all_reduce, or auto"
            )
        if self.exchange is Transport.REDUCE_SCATTER and not self.has_room_for_answers:
            more = "two rounds more: 12" if self.memory is Memory.PER_TASK else "a mean to take: 9"
            raise UserError(
                "exchange: reduce_scatter takes two collectives a round, and memory: "
                f"{self.memory.value} has {more} in a refresh, of at most 8; set exchange: all_reduce, or auto"
            )
        return self

    @model_validator(mode="after")
    def _check_policy(self) -> EPIConfig:
        for problem in policy_problems(self):
            raise UserError(problem)
        return self


def parse_config(section: Mapping[str, Any] | EPIConfig, *, place: str = 'the "epi" section') -> EPIConfig:
    """Validate ``section``; raise one ValueError that lists every problem in it."""
    if isinstance(section, EPIConfig):
        return section
    if not isinstance(section, Mapping):
        raise UserError(f"{place} must be a mapping of settings, got {type(section).__name__}: {section!r}")
    try:
        return EPIConfig.model_validate(dict(section))
    except ValidationError as error:
        raise UserError(summarize(problems_of(error, EPIConfig), place=place)) from None
