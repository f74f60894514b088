"""What a manifest says of an engine's optimizer."""

from __future__ import annotations

from typing import Any

from epi_ds.checkpoint.manifest import SavedOptimizer
from epi_ds.checkpoint.optimizers import plain
from epi_ds.zero3.guard import adds_decay_to_gradient, is_adam

# DeepSpeed's FusedAdam counts its steps in the group, too.
_NO_SETTINGS = ("params", "step")


def optimizer_of(zero3: Any) -> SavedOptimizer:
    """Return the class, the keys of the states, and the hyper-parameters of ZeRO-3's optimizer."""
    base = zero3.optimizer
    return SavedOptimizer(
        name=type(base).__name__,
        algorithm=_algorithm_of(base),
        state_keys=tuple(sorted({key for state in base.state.values() for key in state})),
        groups=tuple(
            {key: plain(value) for key, value in group.items() if key not in _NO_SETTINGS}
            for group in base.param_groups
        ),
    )


def _algorithm_of(base: Any) -> str:
    """Return what must be the same for states to go on: Adams of different makers have the same ones."""
    if not is_adam(base):
        return type(base).__name__
    adds = any(group["weight_decay"] and adds_decay_to_gradient(base, group) for group in base.param_groups)
    amsgrad = any(group.get("amsgrad") for group in base.param_groups)
    return f"{'Adam' if adds else 'AdamW'}{' with amsgrad' if amsgrad else ''}"
