"""What the settings of the ``epi`` section can be chosen from."""

from __future__ import annotations

from enum import StrEnum

# Value of settings that the run decides by itself.
ADAPTIVE = "adaptive"


class PolicyName(StrEnum):
    """Who decides which entries are isolated, and when."""

    EVOLVING = "evolving"
    STATIC = "static"
    NONE = "none"
    RANDOM = "random"
    INVERTED = "inverted"
    FIRST = "first"
    MOMENTUM = "momentum"
    HALF = "half"


class Redraw(StrEnum):
    """When ``policy: random`` draws another mask."""

    NEVER = "never"
    STAGE = "stage"
    REFRESH = "refresh"


class Selection(StrEnum):
    """Over which entries a threshold is one quantile."""

    NORMALIZED_GLOBAL = "normalized_global"
    PER_LAYER = "per_layer"
    RAW_GLOBAL = "raw_global"


class Normalizer(StrEnum):
    """How the importance of one layer is made comparable with that of another."""

    MINMAX = "minmax"
    MEAN = "mean"


class Apply(StrEnum):
    """Where in a step the mask acts."""

    REDUCTION = "reduction"
    UPDATE = "update"


class StateFormat(StrEnum):
    """How importance is stored."""

    FP32 = "fp32"
    BF16 = "bf16"
    U16 = "u16"
    U8 = "u8"
    ADAM = "adam"


class Transport(StrEnum):
    """How the integer vectors of a refresh are summed over the ranks. All give the same bits."""

    AUTO = "auto"
    ALL_GATHER = "all_gather"
    ALL_REDUCE = "all_reduce"
    REDUCE_SCATTER = "reduce_scatter"


class Memory(StrEnum):
    """What of a finished stage's importance is kept."""

    NONE = "none"
    STAGE_MAX = "stage_max"
    PER_TASK = "per_task"


class Protects(StrEnum):
    """Whose importance selection compares where finished stages are remembered."""

    PAST = "past"
    PAST_AND_PRESENT = "past_and_present"


class MissingState(StrEnum):
    """What to do when a checkpoint has no isolation state."""

    ERROR = "error"
    FRESH = "fresh"


class OnFailure(StrEnum):
    """What to do when a checkpoint cannot be saved."""

    CONTINUE = "continue"
    STOP = "stop"


class Curve(StrEnum):
    """How a scheduled ratio goes from its start to its end."""

    LINEAR = "linear"
    COSINE = "cosine"


class AnchorWeight(StrEnum):
    """Which entries an anchor pulls more than others."""

    UNIFORM = "uniform"
    IMPORTANCE = "importance"


class Pull(StrEnum):
    """Where in a step an anchor pulls."""

    UPDATE = "update"
    GRADIENT = "gradient"


class AnchorDevice(StrEnum):
    """Where the weights lie that an anchor pulls towards."""

    PARTITION = "partition"
    CPU = "cpu"
    DISK = "disk"
