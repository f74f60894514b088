"""What the settings of the ``epi`` section can be chosen from."""

from __future__ import annotations

from enum import Enum

# Value of settings that the run decides by itself.
ADAPTIVE = "adaptive"


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
    BF16 = "bf16"
    U16 = "u16"
    U8 = "u8"
    ADAM = "adam"


class Transport(str, Enum):
    """How the integer vectors of a refresh are summed over the ranks. All give the same bits."""

    AUTO = "auto"
    ALL_GATHER = "all_gather"
    ALL_REDUCE = "all_reduce"
    REDUCE_SCATTER = "reduce_scatter"


class Memory(str, Enum):
    """What of a finished stage's importance is kept."""

    NONE = "none"
    STAGE_MAX = "stage_max"
    PER_TASK = "per_task"


class Protects(str, Enum):
    """Whose importance selection compares where finished stages are remembered."""

    PAST = "past"
    PAST_AND_PRESENT = "past_and_present"


class MissingState(str, Enum):
    """What to do when a checkpoint has no isolation state."""

    ERROR = "error"
    FRESH = "fresh"


class OnFailure(str, Enum):
    """What to do when a checkpoint cannot be saved."""

    CONTINUE = "continue"
    STOP = "stop"


class Curve(str, Enum):
    """How a scheduled ratio goes from its start to its end."""

    LINEAR = "linear"
    COSINE = "cosine"
