"""The ``epi`` section of a DeepSpeed configuration."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from epi_ds.errors import UserError, problems_of, summarize

# Top-level key of a DeepSpeed configuration that holds these settings.
SECTION = "epi"


class PolicyName(str, Enum):
    """Who decides which entries are isolated, and when."""

    EVOLVING = "evolving"
    STATIC = "static"
    NONE = "none"


class Selection(str, Enum):
    """Over which entries a threshold is one quantile."""

    NORMALIZED_GLOBAL = "normalized_global"
    PER_LAYER = "per_layer"
    RAW_GLOBAL = "raw_global"


class Normalizer(str, Enum):
    """How the importance of one layer is made comparable with that of another."""

    MINMAX = "minmax"
    MEAN = "mean"


class Apply(str, Enum):
    """Where in a step the mask acts."""

    REDUCTION = "reduction"
    UPDATE = "update"


class StateFormat(str, Enum):
    """How importance is stored."""

    FP32 = "fp32"


class Transport(str, Enum):
    """How the integer vectors of a refresh are summed over the ranks. All give the same bits."""

    AUTO = "auto"
    ALL_GATHER = "all_gather"
    ALL_REDUCE = "all_reduce"
    REDUCE_SCATTER = "reduce_scatter"


class MissingState(str, Enum):
    """What to do when a checkpoint has no isolation state."""

    ERROR = "error"
    FRESH = "fresh"


class EPIConfig(BaseModel):
    """Settings of evolving parameter isolation (arXiv 2604.14010). Frozen; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    policy: PolicyName = PolicyName.EVOLVING
    """``evolving`` selects a new mask every ``refresh_interval`` steps; ``static`` isolates one mask for the
    whole run; ``none`` isolates nothing and measures nothing."""

    ratio: float = Field(0.01, ge=0, lt=1)
    """Requested share of the covered parameters to isolate (the paper's p)."""

    refresh_interval: int = Field(500, ge=1)
    """Applied optimizer steps from one refresh to the next (the paper's H)."""

    ema_decay: float = Field(0.99, ge=0, lt=1)
    """Weight of the old importance in ``S <- ema_decay * S + (1 - ema_decay) * g * g`` (the paper's beta)."""

    selection: Selection = Selection.NORMALIZED_GLOBAL
    """``normalized_global`` (the paper's): one quantile over the normalised importance of all layers;
    ``per_layer``: the quantile of each layer; ``raw_global``: one quantile without normalisation."""

    normalizer: Normalizer = Normalizer.MINMAX
    """``normalized_global`` only: ``minmax`` (the paper's) or ``mean``, which no single outlier decides."""

    layer: Literal["block", "tensor"] | dict[str, str] = "block"
    """What a layer is: the outermost numbered block of a parameter's name, a tensor, or named groups given as
    regular expressions over parameter names, of which every covered parameter must match exactly one."""

    include: tuple[str, ...] = ()
    """Regular expressions over parameter names; empty covers every trainable parameter."""

    exclude: tuple[str, ...] = ()
    """Regular expressions over parameter names that are never isolated, taken from what ``include`` covers."""

    apply: Apply = Apply.REDUCTION
    """``reduction``: isolated entries count as zero gradient for norm, clipping and optimizer (Adam family only);
    ``update`` (the paper's eq. 12-13): the optimizer sees every gradient and only the update is undone."""

    state: StateFormat = StateFormat.FP32
    """Storage of the importance."""

    exchange: Transport = Transport.AUTO
    """Transport of the sketches: ``all_gather``, ``all_reduce``, ``per_layer`` also ``reduce_scatter``, where every
    rank sums and answers for some layers; ``auto`` picks the quickest by the model that `epi-ds estimate` prints."""

    allow_inactive: bool = False
    """Accept a planned run too short for a mask ever to become active."""

    mask_from: str | None = None
    """``static`` only: a checkpoint tag folder (or its ``epi`` folder) whose mask is loaded."""

    probe_steps: int | None = Field(None, ge=1)
    """``static`` only: batches over which squared gradients are averaged before the first step."""

    missing_state: MissingState = MissingState.ERROR
    """Loading a checkpoint without isolation state is an error, or starts with empty importance."""

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
    def _check_exchange(self) -> EPIConfig:
        if self.exchange is Transport.REDUCE_SCATTER and self.selection is not Selection.PER_LAYER:
            raise UserError(
                f"exchange: reduce_scatter deals layers to ranks, but selection: {self.selection.value} exchanges one "
                "small vector for all layers, so there is nothing to scatter; set exchange: all_reduce, or auto"
            )
        return self

    @model_validator(mode="after")
    def _check_policy(self) -> EPIConfig:
        sources = [name for name in ("mask_from", "probe_steps") if getattr(self, name) is not None]
        if self.policy is PolicyName.STATIC and len(sources) != 1:
            raise UserError(
                "policy: static needs exactly one source of its mask, mask_from or probe_steps; got "
                + (" and ".join(sources) or "none")
            )
        if self.policy is not PolicyName.STATIC and sources:
            raise UserError(f"{sources[0]} belongs to policy: static, but policy is {self.policy.value}")
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
