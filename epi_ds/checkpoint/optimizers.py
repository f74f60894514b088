"""The optimizer that saved and the one that goes on: what must be the same, and what a load overwrites.

A load gives the optimizer the states and the hyper-parameters of the checkpoint, by key. Another class takes its own
numbers for those of the other where keys have the same names, and fails in its first step where they do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from epi_ds.checkpoint.manifest import SavedOptimizer

_ABSENT = object()


def changed_optimizer(saved: SavedOptimizer | None, current: SavedOptimizer) -> Iterator[str]:
    """Yield why an optimizer cannot go on from a checkpoint. An earlier release's says nothing of it."""
    if saved is None:
        return
    if saved.algorithm != current.algorithm:
        yield f"the optimizer was {saved}, and is {current}, which would take the states of the other for its own"
    elif saved.state_keys and current.state_keys and saved.state_keys != current.state_keys:
        # An optimizer makes its states in its first step: before it, the class and what it is given must do.
        yield f"the optimizer was {saved}, and is {current}: it would lack states, or have some that it never reads"


def overwritten(saved: SavedOptimizer | None, current: SavedOptimizer, *, scheduled: bool) -> list[str]:
    """Return, in words, the hyper-parameters that a load replaces by others.

    scheduled  a schedule sets the learning rate, and goes on from the checkpoint's

    What one of two classes alone has is about how it computes, and not what.
    """
    if saved is None:
        return []
    same_class = saved.name == current.name
    none: dict[str, Any] = {}
    return [
        f"{name} {_said(now)} by {_said(before)}" + (f" (parameter group {number})" if len(current.groups) > 1 else "")
        for number, (old, new) in enumerate(zip_longest(saved.groups, current.groups, fillvalue=none))
        for name, now in sorted(new.items())
        if not (scheduled and name == "lr")
        for before in [old.get(name, _ABSENT)]
        if before != now and (same_class or before is not _ABSENT)
    ]


def _said(value: Any) -> str:
    return "none" if value is _ABSENT else repr(value)


def plain(value: Any) -> Any:
    """Return a hyper-parameter as JSON has it, so that a saved one equals its own."""
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if hasattr(value, "item"):
        # A tensor of one number, as a learning rate on the device is.
        return plain(value.item()) if getattr(value, "numel", lambda: 1)() == 1 else str(value)
    if isinstance(value, float) and not abs(value) < float("inf"):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
