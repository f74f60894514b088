"""Forwards that are one rank's own: where the weights are gathered, ranks may run as many as each has rows for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def local_forwards(engine: Any) -> Iterator[None]:
    """Within the context, forwards through the engine's module talk to no other rank. Its weights must be gathered.

    ZeRO-3 hooks every submodule, to fetch its weights, and the whole module once more, to begin a forward anew: ranks
    then compare the submodules that they came by. Whoever gathers weights takes the first hooks out; the second one is
    taken out here, since a rank without rows would leave the others waiting in that comparison.
    """
    offload = engine.optimizer.parameter_offload
    hooks = offload.module._forward_pre_hooks
    begin_anew = hooks[offload.fwd_pre_hook.id]
    offload.fwd_pre_hook.remove()
    try:
        yield
    finally:
        # In front of the hooks that fetch, which are put back after this.
        offload.fwd_pre_hook = offload.module.register_forward_pre_hook(begin_anew)
